"""The benchmark of optimizer steps: it measures what is right and refuses what is not."""

import pytest
import torch

from repkern.bench import steps
from repkern.bench.ops import OpsOptions
from repkern.bench.registry import parse_cases


@pytest.fixture(params=["grad_mult_sgd", "grad_mult_adamw"])
def case(request):
    (case,) = parse_cases(f"tiny {request.param} tiny")
    return case


@pytest.fixture(autouse=True)
def _tiny_network(monkeypatch):
    def create(name, block):
        assert (name, block) == ("tiny", "plain")
        return torch.nn.Sequential(torch.nn.Conv2d(5, 5, 3), torch.nn.Conv2d(5, 7, 1), torch.nn.Linear(7, 3))

    monkeypatch.setattr(steps, "create_model", create)


def options():
    return OpsOptions(["reference"], pairs=2, min_sample_seconds=1e-4)


def test_rows_against_a_copy_torch_and_the_released_formulation(case):
    rows = []
    assert steps.run_steps(case, options(), rows.append, lambda text: None) == []
    assert [row.baseline for row in rows] == ["", "torch fused", "released"]
    assert all(row.what == "step" and row.error_over_bound <= 1 and row.ms > 0 for row in rows)
    assert rows[0].gbytes_per_s > 0
    assert rows[0].peak_source == "copy"


def test_a_wrong_step_is_not_timed(case, monkeypatch):
    monkeypatch.setattr(steps.StepProblem, "ours", lambda self: [p.mul_(1.001) for p in self.params])
    rows, said = [], []
    (failure,) = steps.run_steps(case, options(), rows.append, said.append)
    assert "differs from the float64 reference" in failure
    assert "not timed" in said[0]
    assert rows == []


def test_the_released_formulation_of_sgd_is_the_same_step():
    """That of AdamW leaves the bias corrections out, which cost nothing."""
    (case,) = parse_cases("tiny grad_mult_sgd tiny")
    ours, theirs = (steps.StepProblem(case, torch.float64, "cpu") for _ in range(2))
    with torch.no_grad():
        ours.ours()
        theirs.steps["released"]()
    for a, b in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("line", ["one grad_mult_sgd", "one grad_mult_sgd a b"])
def test_a_case_names_one_network(line):
    with pytest.raises(ValueError, match=r"shapes\.txt, line 1"):
        parse_cases(line, "shapes.txt")
