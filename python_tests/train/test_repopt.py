import json

import pytest
import torch
from safetensors.torch import load_file

from repkern.data import ImageSource
from repkern.data.digits import open_digits
from repkern.models.small_vgg import SmallVGG
from repkern.optim import RepSGD, load_scales, save_scales
from repkern.search import HyperSearch
from repkern.train import Callback, Interrupted
from repkern.train.build import build_data, build_model
from repkern.train.metrics import TIMES, read_rows
from repkern.train.optimizers import make_optimizer
from repkern.train.quickstart import whole_test_set
from repkern.train.recipe_files import load_recipe
from repkern.train.repopt import FORMS, SEARCH, RepOptRecipe, form_of, run_hyper_search, run_repopt

pytest.importorskip("sklearn")

SIZES = ["model.options={widths: [6, 8], blocks: 2}", "train.epochs=2", "train.batch_size=256", "train.threads=1"]
SMALL = load_recipe("repopt", [*SIZES, "train.device=cpu", "search_epochs=2"], kind=RepOptRecipe)
STAGES = (SEARCH, *FORMS)
CPU = torch.device("cpu")


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
            quantize=lambda models, data: seen.append((models, data)) or {"images": len(whole_test_set(data, CPU)[1])},
        )
    return folder, summary, seen, said


def results(folder):
    """Everything a run computes, but for the time it took."""
    found = {}
    for name in STAGES:
        rows = read_rows(folder / name)
        found[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
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
    assert json.loads(json.dumps(summary))["recipe"] == SMALL.model_dump(mode="json")
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
    images, labels = whole_test_set(data, CPU)
    for name, model in models.items():
        assert not any("repkern.nn" in type(module).__module__ for module in model.modules())
        with torch.no_grad():
            right = (model(images).argmax(1) == labels).sum().item()
        assert right / 355 == pytest.approx(summary["accuracy"][name], abs=1 / 355)
    twin = SmallVGG((6, 8), 2, 10, 1, "plain").eval()
    twin.load_state_dict(load_file(folder / "repopt.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(twin(images), models["repopt"](images))


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
    scales = load_scales(folder / "scales.safetensors", build_model(form_of("sgd", SMALL), build_data(SMALL)))
    assert len(scales) == 5 * 2 + 3  # five 3x3 layers, three of them with an identity
    assert all(len(scale.unique()) > 1 for scale in scales.values())  # they started equal in every channel
    state = torch.load(folder / SEARCH / "checkpoints/step_00000010/state.pt", weights_only=True)
    assert len(state["callbacks"]["hyper_search"]["history"]) == 2


def test_the_repoptimizer_starts_by_the_scales_and_multiplies(tmp_path):
    data = build_data(SMALL)
    searched = HyperSearch(build_model(form_of("sgd", SMALL), data)).scales()
    save_scales(
        {name: torch.full_like(scale, 0.5) for name, scale in searched.items()}, tmp_path / "scales.safetensors"
    )
    plain = build_model(form_of("sgd", SMALL), data)
    sgd = make_optimizer(plain, form_of("sgd", SMALL))
    model = build_model(form_of("repopt", SMALL, tmp_path), data)
    optimizer = make_optimizer(model, form_of("repopt", SMALL, tmp_path))
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


def test_a_network_of_create_model_can_be_searched(tmp_path):
    options = [
        "model.name=repvgg_a0",
        "model.options={}",
        "model.options={width: 0.125}",
        "train.batch_size=720",
        "search_epochs=1",
    ]
    recipe = load_recipe("repopt", ["train.threads=1", "train.device=cpu", *options], kind=RepOptRecipe)
    train, test = open_digits()
    few = (train.take(torch.arange(720)), test.take(torch.arange(32)))
    data = ImageSource(*few, batch_size=720, seed=0)
    _, rows = run_hyper_search(recipe, data, tmp_path)
    assert len(rows) == 1
    network = build_model(form_of("sgd", recipe), data)
    assert load_scales(tmp_path / "scales.safetensors", network)


def test_bad_settings():
    with pytest.raises(ValueError, match="search_epochs"):
        load_recipe("repopt", ["search_epochs=0"], kind=RepOptRecipe)
