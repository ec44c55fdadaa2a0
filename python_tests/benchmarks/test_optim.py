"""`repkern bench optim` and `repopt`: a wrong step is not timed, rows are valid, targets are those of the issue."""

import math

import pytest
import torch

from repkern.bench import optim, repopt, targets
from repkern.bench.optim import OptimCase, OptimOptions, ReleasedSGD, grad_mults_of, optim_cases, run_optim
from repkern.bench.repopt import RepOptCase, RepOptOptions, repopt_cases, run_repopt
from repkern.models import create_model
from repkern.optim import RepSGD

TINY = OptimCase("tiny", "repvgg_a0")
TINY_STEP = RepOptCase("tiny", "repvgg_a0", 2, 32)


def ignore(text):
    pass


@pytest.fixture(scope="module")
def rows():
    collected = []
    assert run_optim([TINY], OptimOptions(pairs=2, width=0.125), collected.append, ignore) == []
    return collected


def test_every_rival_has_a_row(rows):
    assert [(row.kind, row.what, row.baseline) for row in rows] == [
        ("optim", "sgd", "torch fused"),
        ("optim", "sgd", "released"),
        ("optim", "adamw", "torch fused"),
        ("optim-memory", "multipliers", "parameters"),
    ]
    for row in rows[:3]:
        assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
        assert math.isfinite(row.ratio)
        assert 0 <= row.error_over_bound <= 1
        assert row.gbytes_per_s > 0
    assert rows[3].extra_mib > 0


@pytest.mark.parametrize("cls", ["RepSGD", "RepAdamW"])
def test_a_wrong_step_is_not_timed(monkeypatch, cls):
    real = getattr(optim, cls)

    class Wrong(real):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(1 + 1e-4)

    monkeypatch.setattr(optim, cls, Wrong)
    found = []
    (failure,) = run_optim([TINY], OptimOptions(pairs=1, width=0.125), found.append, ignore)
    assert "times the bound" in failure
    assert found == []


def test_the_released_formulation_is_the_same_step():
    torch.manual_seed(0)
    models = [create_model("repvgg_a0", block="conv_bn", width=0.125, num_classes=4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mults = [grad_mults_of(model) for model in models]
    masks = {weight: mult.dense(weight.shape) for weight, mult in mults[1].items()}
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": optim._DECAY}
    steps = [
        RepSGD(models[0].parameters(), optim._LR, grad_mults=mults[0], **settings),
        ReleasedSGD(list(models[1].parameters()), masks),
    ]
    for _ in range(3):
        gradients = [1e4 * torch.randn_like(parameter) for parameter in models[0].parameters()]
        for model, step in zip(models, steps, strict=True):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            step.step()
    assert len(mults[0]) == 22
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_training_steps_have_rows_for_every_rival():
    collected = []
    assert run_repopt([TINY_STEP], RepOptOptions(pairs=1, width=0.125), collected.append, ignore) == []
    assert [row.baseline for row in collected] == ["plain RepVGG", "our RepVGG", "plain, SGD"]
    for row in collected:
        assert row.kind == "repopt"
        assert row.ratio > 0
        assert 0 <= row.error_over_bound <= 1


def test_training_that_is_not_that_of_its_branches_is_not_timed(monkeypatch):
    class Wrong(RepSGD):
        _power = 1  # AdamW's multiplier

    monkeypatch.setattr(repopt, "RepSGD", Wrong)
    found = []
    (failure,) = run_repopt([TINY_STEP], RepOptOptions(pairs=1, width=0.125), found.append, ignore)
    assert "CSLA" in failure
    assert found == []


def test_the_targets():
    b1 = "repopt_vgg_b1"
    assert b1 in [case.name for case in optim_cases()]
    assert targets.optim_target("cpu", b1, "sgd", "released").value == 1.5
    for what in ("sgd", "adamw"):
        assert 1 / targets.optim_target("cpu", b1, what, "torch fused").value == pytest.approx(1.05, rel=1e-3)
    assert targets.optim_target("cuda", b1, "sgd", "released").value == 3
    assert targets.optim_target("cpu", "repvgg_a0", "sgd", "released") is None
    assert targets.optim_memory_target(b1).at_most
    assert targets.optim_memory_target(b1).value == 0.1
    (case,) = [case.name for case in repopt_cases() if case.model == b1]
    assert targets.repopt_target("cpu", case, "plain RepVGG").value == 1.6
    assert targets.repopt_target("cpu", case, "our RepVGG") is None
