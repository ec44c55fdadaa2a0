import json
import unicodedata

import numpy
import pytest
import torch
from safetensors.torch import load_file

from repkern.cli import _options
from repkern.deploy.quantize_torchao import missing_torchao
from repkern.train.trainer import Trainer

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _small(monkeypatch, small_recipe):
    """`repkern repopt` on a network small enough for a test."""
    from repkern.train import repopt

    sizes = ["model.options={widths: [6, 8], blocks: 2}", "train.epochs=1", "train.batch_size=256", "search_epochs=2"]
    small_recipe("repopt", sizes)
    monkeypatch.setattr(repopt, "_STEP_ROUNDS", 2)
    monkeypatch.setattr(repopt, "_LATENCY_ROUNDS", 2)


@pytest.fixture
def without_torchao(monkeypatch):
    monkeypatch.setattr("repkern.deploy.quantize_torchao.missing_torchao", lambda: "quantization needs torchao: ...")


@pytest.fixture
def interrupt_epoch(monkeypatch):
    """Ctrl-C in the given epoch of the search."""

    def arm(epoch):
        real = Trainer._run_epoch

        def one_epoch(self):
            if any(type(part).__name__ == "CSLABlock" for part in self.model.modules()) and self.epoch + 1 == epoch:
                raise KeyboardInterrupt
            return real(self)

        monkeypatch.setattr(Trainer, "_run_epoch", one_epoch)
        return lambda: monkeypatch.setattr(Trainer, "_run_epoch", real)

    return arm


@pytest.fixture
def photographs(tmp_path):
    """An image folder of two classes, as large as a batch needs."""
    image = pytest.importorskip("PIL.Image")
    generator = numpy.random.default_rng(0)
    for part, count in (("train", 130), ("test", 4)):
        for name, low in (("dark", 0), ("light", 128)):
            folder = tmp_path / "photographs" / part / name
            folder.mkdir(parents=True)
            for at in range(count):
                pixels = generator.integers(low, low + 128, (8, 8, 3), dtype=numpy.uint8)
                image.fromarray(pixels).save(folder / f"{at}.png")
    return tmp_path / "photographs"


@pytest.mark.skipif(missing_torchao() is not None, reason="torchao is not installed")
def test_the_whole_job_in_a_pipe(command, tmp_path):
    code, out, err = command("repopt")
    assert (code, err) == (0, "")
    assert not {c for c in out if unicodedata.category(c) == "Cc"} - {"\n"}
    assert out.count(" epoch ") == 2 + 4
    for text in ("test accuracy", "training step", "peak memory", "INT8", "SQNR", "hyper-search", "from_scales"):
        assert text in out
    folder = tmp_path / "runs" / "repopt"
    for name in ("recipe.json", "summary.json", "scales.safetensors", "repopt.safetensors", "repvgg/metrics.csv"):
        assert (folder / name).is_file()
    for name in ("curves.png", "kernels.png", "sensitivity.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    quantized = summary["quantized"]
    for scheme in ("int8", "int8_per_tensor"):
        for name in ("sgd", "repopt", "repvgg", "qarepvgg"):
            assert quantized[scheme][name]["float_accuracy"] == pytest.approx(summary["accuracy"][name], abs=1 / 355)
            assert 10 < quantized[scheme][name]["sqnr"] < 90
    assert [layer["name"] for layer in quantized["layers"]["repopt"]][-1] == "head"


@pytest.mark.usefixtures("without_torchao")
def test_json_without_torchao(command):
    code, out, err = command("repopt", "--json")
    assert code == 0
    summary = json.loads(out)
    assert summary["quantized"] is None
    assert summary["test_images"] == 355
    assert "INT8 was left out: quantization needs torchao" in err
    assert "training step" in err


@pytest.mark.usefixtures("without_torchao")
def test_interrupted_then_the_same_command_continues(command, tmp_path, interrupt_epoch):
    disarm = interrupt_epoch(2)
    code, out, _ = command("repopt")
    assert code == 130
    assert "so does: repkern repopt --resume\n" in out
    assert not (tmp_path / "runs/repopt/summary.json").exists()
    disarm()
    code, _, err = command("repopt", "--resume", "--epochs", "7")
    assert code == 2
    assert "epochs 1, not 7" in err
    code, out, _ = command("repopt", "--resume")
    assert code == 0
    assert "Continuing" in out
    assert "search   epochs 1 to 1 are already done" in out
    assert (tmp_path / "runs/repopt/summary.json").exists()


@pytest.mark.usefixtures("without_torchao")
def test_images_of_a_folder(command, photographs):
    code, out, _ = command("repopt", "--data", str(photographs), "--image-size", "8", "--search-epochs", "1", "--json")
    assert code == 0
    summary = json.loads(out)
    assert summary["test_images"] == 8
    assert summary["recipe"]["data"]["root"] == str(photographs)


def test_a_search_for_a_recipe_and_a_training_with_what_it_found(command, tmp_path):
    small = ["-s", "model.options={widths: [4, 6], blocks: 2}", "-s", "data.limit=256", "--threads", "1"]
    code, out, _ = command("search", "hyper", "--recipe", "digits_repopt", "--epochs", "1", *small)
    assert code == 0
    assert "5 layers have scales" in out
    words = ("train", "digits_repopt", "--set", "optimizer.scales=runs/search/scales.safetensors")
    assert " ".join(("repkern train digits_repopt --set optimizer.name=repsgd", *words[2:])) in out
    code, out, _ = command(*words, *small, "-s", "train.epochs=1", "--json")
    assert code == 0
    assert json.loads(out)["recipe"]["optimizer"]["name"] == "repsgd"
    code, _, err = command(*words, "-s", "train.epochs=1", "--threads", "1", "--out", "other")  # another network's
    assert code == 1
    assert "the scales are not for this SmallVGG" in err


def test_the_search_alone(command, tmp_path):
    code, out, err = command("search", "hyper", "--epochs", "1")
    assert (code, err) == (0, "")
    assert "5 layers have scales, in runs/search/scales.safetensors" in out
    assert "from_scales" in out
    scales = load_file(tmp_path / "runs/search/scales.safetensors")
    code, out, _ = command("search", "hyper", "--epochs", "1", "--fresh", "--json", "--seed", "1")
    assert code == 0
    summary = json.loads(out)
    assert summary["layers"] == 5
    other = load_file(summary["scales"])
    assert other.keys() == scales.keys()
    assert any(not torch.equal(other[name], scale) for name, scale in scales.items())
    assert summary["means"].keys() == scales.keys()


def test_the_search_is_resumed(command, interrupt_epoch):
    disarm = interrupt_epoch(2)
    code, out, _ = command("search", "hyper", "--out", "mine")
    assert code == 130
    assert "so does: repkern search hyper --resume --out mine" in out
    disarm()
    code, out, _ = command("search", "hyper", "--out", "mine")
    assert code == 0
    assert "epochs 1 to 1 are already done" in out


@pytest.mark.parametrize("words", [("repopt",), ("search", "hyper")])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--resume", "--fresh"), "contradict"),
        (("--resume",), "no unfinished run to resume"),
        (("--model", "repvgg_a9"), "repvgg_a0"),
    ],
)
def test_wrong_use(command, words, options, text):
    code, out, err = command(*words, *options)
    assert (code, out) == (2, "")
    assert text in err


def test_a_folder_without_images_is_one_clear_line(command, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = command("repopt", "--data", "empty")
    assert code == 1
    assert "needs the folders train and test" in err
    assert len(err.splitlines()) == 1


def test_a_missing_extra_is_one_clear_line(command, monkeypatch):
    real = _options.importlib.util.find_spec
    monkeypatch.setattr(_options.importlib.util, "find_spec", lambda name: None if name == "sklearn" else real(name))
    code, out, err = command("repopt")
    assert (code, out) == (1, "")
    assert err.endswith("pip install 'repkern[quickstart]'\n")


def test_help_teaches(command):
    for words in (("repopt",), ("search", "hyper")):
        code, out, _ = command(*words, "--help")
        assert code == 0
        assert "Examples" in out
        assert "scales" in out
