import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from repkern.models.small_vgg import SmallVGG
from repkern.optim import RepSGD, load_scales
from repkern.train import Callback, Interrupted
from repkern.train.data import load_digits
from repkern.train.repopt import (
    FORMS,
    SEARCH,
    RepOptConfig,
    make_network,
    make_training,
    run_hyper_search,
    run_repopt,
)

pytest.importorskip("sklearn")

SMALL = RepOptConfig(epochs=2, search_epochs=2, batch_size=256, widths=(6, 8), blocks=2)
STAGES = (SEARCH, *FORMS)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr("repkern.train.repopt._STEP_ROUNDS", 2)
    monkeypatch.setattr("repkern.train.repopt._LATENCY_ROUNDS", 2)


class InterruptInEpoch(Callback):
    def __init__(self, epoch):
        self._epoch = epoch

    def on_step_end(self, trainer):
        if trainer.epoch + 1 == self._epoch:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repopt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repkern.train.repopt._STEP_ROUNDS", 2)
        seen, said = [], []
        summary = run_repopt(
            SMALL,
            folder,
            say=said.append,
            quantize=lambda models, data: seen.append((models, data)) or {"images": len(data.test_labels)},
        )
    return folder, summary, seen, said


def results(folder):
    """Everything a run computes, but for the time it took."""
    found = {}
    for name in STAGES:
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    for name in ("scales", "repopt"):
        found |= {f"{name}.{key}": value for key, value in load_file(folder / f"{name}.safetensors").items()}
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert same, key


def test_the_summary_has_every_figure(finished):
    folder, summary, _, said = finished
    assert json.loads(json.dumps(summary))["config"]["widths"] == list(SMALL.widths)
    assert list(summary["accuracy"]) == list(STAGES)
    for name in FORMS:
        assert summary["train_step_seconds"][name] > 0
        assert summary["train_peak_bytes"][name] > 12 * summary["parameters"][name]
    assert summary["parameters"]["sgd"] == summary["parameters"]["repopt"] < summary["parameters"]["repvgg"]
    assert summary["quantized"] == {"images": 355}
    assert len(said) == 3
    assert results(folder)[SEARCH][-1]["test_accuracy"] == summary["accuracy"][SEARCH]


def test_what_is_quantized_is_plain_and_does_what_was_measured(finished):
    folder, summary, seen, _ = finished
    ((models, data),) = seen
    assert list(models) == list(FORMS)
    for name, model in models.items():
        assert not any("repkern.nn" in type(module).__module__ for module in model.modules())
        with torch.no_grad():
            right = (model(data.test_images).argmax(1) == data.test_labels).sum().item()
        assert right / 355 == pytest.approx(summary["accuracy"][name], abs=1 / 355)
    twin = SmallVGG(SMALL.widths, SMALL.blocks, 10, 1, "plain").eval()
    twin.load_state_dict(load_file(folder / "repopt.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(twin(data.test_images), models["repopt"](data.test_images))


@pytest.mark.parametrize("stage", [SEARCH, "repopt"])
def test_an_interrupted_run_continues_bit_for_bit(finished, tmp_path, stage):
    def callbacks(name):
        return [InterruptInEpoch(2)] if name == stage else []

    with pytest.raises(Interrupted):
        run_repopt(SMALL, tmp_path, callbacks=callbacks)
    run_repopt(SMALL, tmp_path)
    assert_same(results(tmp_path), results(finished[0]))


def test_the_scales_are_those_that_were_trained(finished):
    folder, *_ = finished
    scales = load_scales(folder / "scales.safetensors", make_network("conv_bn", SMALL, load_digits()))
    assert len(scales) == 5 * 2 + 3  # five 3x3 layers, three of them with an identity
    assert all(len(scale.unique()) > 1 for scale in scales.values())  # they started equal in every channel
    state = torch.load(folder / SEARCH / "checkpoints/epoch_0002/state.pt", weights_only=True)
    assert len(state["callbacks"]["hyper_search"]["history"]) == 2


def test_the_repoptimizer_starts_by_the_scales_and_multiplies():
    data = load_digits()
    scales = {name: torch.full_like(scale, 0.5) for name, scale in run_scales(data).items()}
    plain, sgd = make_training("sgd", SMALL, data, scales)
    model, optimizer = make_training("repopt", SMALL, data, scales)
    assert isinstance(optimizer, RepSGD)
    assert type(sgd) is torch.optim.SGD
    assert len(optimizer.grad_mults) == 5
    weight = model.stages[0][1].conv.weight
    surround = weight[:, :, 0, 0]
    torch.testing.assert_close(surround, 0.5 * plain.stages[0][1].conv.weight[:, :, 0, 0])
    diagonal = weight[:, :, 1, 1].diagonal()
    assert (diagonal - 1).abs().max() < 0.6  # the identity of the rule of initialization
    for group, other in zip(optimizer.param_groups, sgd.param_groups, strict=True):
        assert {key: group[key] for key in ("lr", "momentum", "nesterov", "weight_decay")} == {
            key: other[key] for key in ("lr", "momentum", "nesterov", "weight_decay")
        }


def run_scales(data):
    from repkern.search import HyperSearch

    return HyperSearch(make_network("conv_bn", SMALL, data)).scales()


def test_a_network_of_create_model_can_be_searched(tmp_path):
    config = dataclasses.replace(SMALL, model="repvgg_a0", search_epochs=1, batch_size=720)
    data = load_digits()
    small = type(data)(data.train_images[:720], data.train_labels[:720], data.test_images[:32], data.test_labels[:32])
    with pytest.MonkeyPatch.context() as patch:
        from repkern.models import create_model

        patch.setattr(
            "repkern.train.repopt.create_model", lambda name, **options: create_model(name, width=0.125, **options)
        )
        scales, rows = run_hyper_search(config, small, tmp_path)
        network = make_network("conv_bn", config, small)
    assert len(rows) == 1
    assert load_scales(tmp_path / "scales.safetensors", network).keys() == scales.keys()


@pytest.mark.parametrize("wrong", [{"search_epochs": 0}, {"blocks": 0}, {"image_size": 0}, {"augment": -1.0}])
def test_bad_settings(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(SMALL, **wrong)
