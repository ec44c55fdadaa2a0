"""`repkern train`: runs, what continues them, and everything that can be wrong with what was asked for."""

import json
import os
import resource
import signal
import subprocess
import sys

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import repkern
from repkern.cli import _options
from repkern.models import save
from repkern.train.recipe_files import load_recipe
from repkern.train.runs import open_run
from repkern.train.trained import load_trained

TINY = """
base: digits_plain
about: a network that is trained in two seconds
model: {options: {widths: [6, 8], blocks: 1}}
data: {limit: 256, augment: []}
train: {epochs: 2, batch_size: 64, threads: 1}
"""


@pytest.fixture(autouse=True)
def tiny(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "tiny.yaml"
    torch.set_num_threads(threads)


@pytest.fixture
def stop_at(monkeypatch):
    """A SIGTERM to this process after so many steps; 0 for none any more."""

    def made(step):
        from repkern.cli import _progress

        def on_step_end(self, trainer):
            if trainer.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(_progress._Lines, "on_step_end", on_step_end)

    return made


def test_a_run_has_everything(command, tmp_path):
    code, out, _ = command("train", "tiny.yaml")
    assert code == 0
    assert "Training small_vgg of conv_bn on digits on 1 CPU threads" in out
    assert out.count("test accuracy") == 2
    assert "repkern eval runs/tiny" in out
    run = tmp_path / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"], len(summary["classes"])) == (8, 2, 10)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    weights = load_file(str(run / "model.safetensors"))
    newest = load_file(str(run / "checkpoints" / "step_00000008" / "weights.safetensors"))
    assert weights.keys() == newest.keys()
    assert all(torch.equal(weights[name], newest[name]) for name in weights)


def test_json_is_all_that_stdout_has(command):
    code, out, err = command("train", "tiny.yaml", "--json", "--set", "ema={decay: 0.9}", "--out", "here")
    assert code == 0
    summary = json.loads(out)
    assert summary["recipe"]["ema"]["decay"] == 0.9
    assert summary["model"] == os.path.join(os.getcwd(), "here", "model.safetensors")
    assert "Results go to here" in err


def test_an_interrupted_run_continues_to_the_same_bits(command, stop_at, tmp_path):
    assert command("train", "tiny.yaml", "--out", "whole")[0] == 0
    stop_at(3)
    code, out, _ = command("train", "tiny.yaml", "--out", "parts")
    assert code == 130
    assert "Interrupted by SIGTERM after step 4" in out
    assert "Every step up to 4 is safe" in out
    assert "repkern train tiny.yaml --resume --out parts" in out
    stop_at(0)
    code, out, _ = command("train", "tiny.yaml", "--out", "parts")
    assert code == 0
    assert "Continuing" in out
    one, other = (load_file(str(tmp_path / name / "model.safetensors")) for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert command("train", "tiny.yaml", "--out", "parts")[0] == 0  # a finished one is kept
    assert (tmp_path / "parts-2" / "summary.json").exists()


def test_a_dry_run_trains_nothing(command, tmp_path):
    code, out, _ = command("train", "tiny.yaml", "--dry-run", "--set", "model.block=orepa")
    assert code == 0
    assert "block: orepa" in out
    assert "stages.1.0" in out
    assert "kept for the backward" in out
    assert not (tmp_path / "runs").exists()
    code, out, _ = command("train", "repvgg_table4_a0", "--dry-run", "--json")
    found = json.loads(out)
    assert (found["classes"], found["image"], found["images_per_process"]) == (1000, [3, 224, 224], 256)
    assert found["parameters"] == found["trained_parameters"]
    assert round(found["parameters"] / 1e6, 2) == 9.11  # the released training form
    assert found["memory"]["total"] > 4 * found["parameters"] * 3


def test_a_dry_run_shows_a_recipe_that_can_be_run_again(command, tmp_path):
    _, out, _ = command("train", "tiny.yaml", "--dry-run", "--set", "train.seed=7", "--device", "cpu")
    (tmp_path / "again.yaml").write_text(out[: out.index("\nlayer")])
    wanted = load_recipe(tmp_path / "tiny.yaml", ["train.seed=7", "train.device=cpu"])
    assert load_recipe(tmp_path / "again.yaml") == wanted


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["train", "nothing"], 2, "there is no recipe 'nothing'"),
        (["train", "digits_plian"], 2, "did you mean digits_plain"),
        (["train", "none.yaml"], 2, "there is no file 'none.yaml'"),
        (["train", "tiny.yaml", "--set", "optimizer.lrr=1"], 2, "did you mean optimizer.lr?"),
        (["train", "tiny.yaml", "--set", "optimizer.lr=fast"], 2, "optimizer.lr: must be a valid number, got 'fast'"),
        (["train", "tiny.yaml", "--set", "lr"], 2, "--set lr: needs a field and a value"),
        (["train", "tiny.yaml", "--resume", "--fresh"], 2, "--resume and --fresh contradict each other"),
        (["train", "tiny.yaml", "--resume"], 2, "there is no unfinished run to resume"),
        (["train", "tiny.yaml", "--data", "x"], 2, "the digits come with scikit-learn"),
        (["train", "tiny.yaml", "--out", "tiny.yaml"], 2, "is a file; a run needs a folder"),
        (["train", "tiny.yaml", "--set", "model.name=resnet19"], 1, "there is no model 'resnet19'"),
        (["train", "tiny.yaml", "--set", "model.block=dbbb"], 1, "block must be one of"),
        (["train", "tiny.yaml", "--set", "model.freeze=[stam.*]"], 1, "'stam.*' matches no parameter"),
        (["train", "tiny.yaml", "--set", "model.replace={block: Conv}"], 1, "repkern.nn has no class 'Conv'"),
        (
            ["train", "tiny.yaml", "--set", "model.replace={block: OREPAConv2d, options: {scale: 1}}"], 1,
            "model.replace.options: OREPAConv2d has no option scale; it has branches, expansion",
        ),
        (
            ["train", "tiny.yaml", "--set", "model.replace={block: OREPAConv2d, where: [x]}"], 1,
            "nothing to replace by OREPAConv2d in SmallVGG where ['x']",
        ),
        (["train", "tiny.yaml", "--set", "optimizer.layer_lr.x=2"], 1, "'x' matches no trained parameter"),
        (["train", "tiny.yaml", "--set", "model.checkpoint=none.pth"], 1, "none.pth"),
        (["train", "tiny.yaml", "--set", "data.classes=7"], 1, "digits has 10 classes, the recipe wants 7"),
        (["train", "tiny.yaml", "--set", "train.batch_size=5000"], 1, "256"),
        (["train", "tiny.yaml", "--dry-run", "--set", "model.name=resnet19"], 1, "there is no model 'resnet19'"),
        (["train", "tiny.yaml", "--dry-run", "--set", "train.accumulate=3"], 1, "cannot be divided"),
        (["train", "finetune_folder", "--data", "nowhere"], 1, "nowhere"),
        (["train", "digits_repopt"], 1, "digits_scales.safetensors"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_an_exit_code(command, words, code, expected):
    found, _, err = command(*words)
    assert (found, err.count("Error:")) == (code, 1)
    assert expected in err
    assert "Traceback" not in err


def test_a_run_that_could_not_begin_leaves_no_folder(command, tmp_path):
    assert command("train", "tiny.yaml", "--set", "model.name=resnet19")[0] == 1
    assert not (tmp_path / "runs" / "tiny").exists()
    assert command("train", "tiny.yaml", "--set", "train.max_steps=1")[0] == 0
    assert (tmp_path / "runs" / "tiny" / "summary.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(command):
    for option in (("--device", "cuda"), ("--set", "train.device=cuda")):
        code, _, err = command("train", "tiny.yaml", *option)
        assert (code, "no CUDA GPU or driver was found" in err) == (2, True), option


def test_files_that_cannot_be_recipes(command, tmp_path):
    (tmp_path / "new.yaml").write_text("version: 2\n")
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    (tmp_path / "wrong.yaml").write_text("train:\n  epochs: many\n  batch: 3\n")
    for name, expected in (
        ("new.yaml", "new.yaml:1: version: 2 is newer than this repkern"),
        ("a.yaml", "in a circle: a.yaml -> b.yaml -> a.yaml"),
        ("wrong.yaml", "wrong.yaml:2: train.epochs: must be a valid integer, got 'many'"),
        ("wrong.yaml", "wrong.yaml:3: train.batch: there is no such field; did you mean train.batch_size?"),
    ):
        code, _, err = command("train", name)
        assert (code, expected in err) == (2, True), err


def test_folders_without_images(command, tmp_path):
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
    code, _, err = command("train", "finetune_folder", "--data", "pets")
    assert code == 1
    assert "image" in err
    assert "pets" in err


def test_weights_of_another_network(command, tmp_path):
    assert command("train", "tiny.yaml")[0] == 0
    code, _, err = command(
        "train", "tiny.yaml", "--out", "other", "-s", "model.checkpoint=runs/tiny", "-s", "model.options.widths=[6, 12]"
    )
    assert code == 1
    assert "stages.1" in err
    code, _, _ = command("train", "tiny.yaml", "--out", "tuned", "--set", "model.checkpoint=runs/tiny", "--json")
    assert code == 0
    first = json.loads((tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()[0])
    assert (
        json.loads((tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()[0])["train_loss"]
        < first["train_loss"]
    )


def test_fine_tuning_on_a_folder_of_images(command, tmp_path):
    generator = numpy.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "pets" / part / label).mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 256, (40, 40, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / part / label / f"{number}.png")
    torch.manual_seed(0)
    trained = repkern.create_model("resnet18", num_classes=5, width=0.25)
    save(trained, tmp_path / "resnet18.safetensors")
    small = (
        "model.options={width: 0.25}",
        "data.image_size=32",
        "data.workers=0",
        "train.batch_size=4",
        "train.epochs=1",
    )
    words = [word for change in (*small, "train.threads=1") for word in ("--set", change)]
    code, out, err = command("train", "finetune_folder", "--data", "pets", "--out", "tuned", "--json", *words)
    assert code == 0, err
    assert json.loads(out)["classes"] == ["cat", "dog"]
    found = load_trained(tmp_path / "tuned")
    assert torch.equal(found.model.stem.conv.weight, trained.stem.conv.weight)  # frozen
    assert found.model.head.out_features == 2
    blocks = [name for name, module in found.model.named_modules() if isinstance(module, repkern.OREPAConv2d)]
    assert blocks
    assert all(name.startswith("stages.3.") for name in blocks)
    first = found.model.stages[0][0].conv1.conv.weight
    moved = (first - trained.stages[0][0].conv1.conv.weight).abs().max()
    assert 0 < moved < 0.1  # trained, from what it was


def test_a_run_of_another_recipe_is_not_continued(command, stop_at, tmp_path):
    stop_at(3)
    assert command("train", "tiny.yaml")[0] == 130
    code, _, err = command("train", "tiny.yaml", "--resume", "--set", "optimizer.lr=0.01")
    assert code == 2
    assert "has optimizer.lr 0.1, not 0.01" in err
    code, out, _ = command("train", "tiny.yaml", "--set", "optimizer.lr=0.01", "--set", "train.max_steps=2")
    assert code == 0
    assert "Left alone: the unfinished run tiny has train.max_steps 0, not 2; optimizer.lr 0.1, not 0.01" in out
    assert (tmp_path / "runs" / "tiny-2" / "summary.json").exists()


def test_two_runs_in_one_folder(command, stop_at, tmp_path):
    stop_at(3)
    assert command("train", "tiny.yaml")[0] == 130
    recipe = load_recipe("tiny.yaml", ["train.device=cpu"])
    with open_run(tmp_path / "runs" / "tiny", recipe):
        code, _, err = command("train", "tiny.yaml", "--resume")
    assert code == 2
    assert "another process is working in" in err


def test_a_folder_that_cannot_be_made(command):
    code, _, err = command("train", "tiny.yaml", "--out", "/proc/none/run")
    assert code == 1
    assert "/proc/none" in err


def test_a_full_disk_is_said(command):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # what fits holds settings, but no weights
    try:
        code, out, err = command("train", "tiny.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert "Training goes on, and it will be tried again" in out
    assert "cannot be written" in err


def test_two_processes_share_a_run(tiny, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
            *("--standalone", "-m", "repkern", "train", "tiny.yaml", "--device", "cpu", "--json"),
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # of one process
    assert (summary["processes"], summary["steps"]) == (2, 8)
    assert done.stderr.count("Training small_vgg") == 1
    assert "2 processes, 1 CPU threads each" in done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    "words", [("train", "tiny.yaml"), ("eval", "tiny.yaml"), ("predict", "a.png", "-c", "x"), ("recipes",)]
)
@pytest.mark.parametrize(("module", "shown"), [("yaml", "PyYAML"), ("accelerate", "Accelerate")])
def test_what_is_not_installed_is_named(command, monkeypatch, words, module, shown):
    real = _options.importlib.util.find_spec
    monkeypatch.setattr(_options.importlib.util, "find_spec", lambda name: None if name == module else real(name))
    code, _, err = command(*words)
    assert code == 1
    assert f"{words[0]} needs {shown}: pip install 'repkern[train]'" in err


def test_help_teaches(command):
    code, out, _ = command("train", "--help")
    assert code == 0
    for words in ("--set", "--dry-run", "--resume", "torchrun", "repkern train digits_orepa"):
        assert words in out
