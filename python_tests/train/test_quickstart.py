"""The main job on a network small enough for a test: the same code, settings of its own."""

import pytest
import torch

from repkern.models.digits import DigitsNet, load_digits_net
from repkern.train import Callback, Interrupted
from repkern.train.build import build_data, build_model
from repkern.train.metrics import TIMES, read_rows
from repkern.train.quickstart import FORMS, form_of, run_quickstart, whole_test_set
from repkern.train.recipe_files import load_recipe

pytest.importorskip("sklearn")

SIZES = ["model.options={widths: [6, 8], blocks: 1}", "train.epochs=2", "train.batch_size=256", "train.threads=1"]
SMALL = load_recipe("quickstart", [*SIZES, "train.seed=1", "train.device=cpu"])
EXACT = ("accuracy", "max_difference", "largest_output", "parameters", "test_images")


class InterruptInEpoch(Callback):
    def __init__(self, epoch):
        self._epoch = epoch

    def on_step_end(self, trainer):
        if trainer.epoch + 1 == self._epoch:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_quickstart(SMALL, folder)


def results(folder):
    """Everything in a run folder that must repeat: all weights, and the metrics but for the time taken."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found[str(path.relative_to(folder))] = path.read_bytes()
    for name in FORMS:
        rows = read_rows(folder / name)
        found[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        assert all(set(TIMES) < set(row) for row in rows)
    return found


def test_a_second_run_gives_the_same_bits(tmp_path, finished):
    folder, summary = finished
    again = run_quickstart(SMALL, tmp_path)
    assert results(tmp_path) == results(folder)
    assert len(results(folder)) == 1 + len(FORMS) * 3  # two checkpoints and the metrics of each, and the deployed
    assert {name: again[name] for name in EXACT} == {name: summary[name] for name in EXACT}


def test_another_seed_gives_other_weights(tmp_path, finished):
    run_quickstart(load_recipe("quickstart", [*SIZES, "train.seed=2", "train.device=cpu"]), tmp_path)
    assert results(tmp_path)["plain.safetensors"] != results(finished[0])["plain.safetensors"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("epoch", [1, 2])
def test_interrupted_and_resumed_gives_the_same_bits(tmp_path, finished, form, epoch):
    with pytest.raises(Interrupted):
        run_quickstart(SMALL, tmp_path, callbacks=lambda name: [InterruptInEpoch(epoch)] if name == form else [])
    assert not (tmp_path / "plain.safetensors").exists()
    run_quickstart(SMALL, tmp_path)
    assert results(tmp_path) == results(finished[0])


def test_the_deployed_network_is_plain_and_does_what_was_measured(finished):
    folder, summary = finished
    model = load_digits_net(folder / "plain.safetensors")
    assert type(model) is DigitsNet
    assert not any("repkern.nn" in type(module).__module__ for module in model.modules())
    images, labels = whole_test_set(build_data(SMALL), torch.device("cpu"))
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).sum().item()
    assert right / len(labels) == summary["accuracy"]["deployed"]
    assert summary["parameters"]["deployed"] == summary["parameters"]["plain"] < summary["parameters"]["orepa"]


def test_the_deployed_network_computes_what_was_trained(finished):
    _, summary = finished
    assert summary["max_difference"] <= 64 * torch.finfo(torch.float32).eps * summary["largest_output"]
    assert summary["accuracy"]["deployed"] == pytest.approx(summary["accuracy"]["orepa"], abs=1 / 355)


def test_measurements_are_there(finished):
    _, summary = finished
    for name in ("plain", "orepa"):
        assert summary["train_step_seconds"][name] > 0
        assert summary["latency_seconds"][name] > 0
    weights = 4 * summary["parameters"]["plain"]
    # At least weights, gradients and momentum; OREPA adds its branches to each.
    assert summary["train_peak_bytes"]["plain"] > 3 * weights
    assert summary["train_peak_bytes"]["orepa"] > summary["train_peak_bytes"]["plain"]


def test_every_convolution_is_replaced():
    data = build_data(SMALL)
    plain, orepa = (build_model(form_of(name, SMALL), data) for name in FORMS)
    convs = [name for name, module in plain.named_modules() if isinstance(module, torch.nn.Conv2d)]
    blocks = [name for name, module in orepa.named_modules() if type(module).__name__ == "OREPAConv2d"]
    assert blocks == convs


def test_global_settings_are_put_back(tmp_path):
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(Interrupted):
        run_quickstart(
            load_recipe("quickstart", [*SIZES, f"train.threads={threads + 1}"]),
            tmp_path,
            callbacks=lambda name: [InterruptInEpoch(1)],
        )
    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.utils.deterministic.fill_uninitialized_memory is fill
