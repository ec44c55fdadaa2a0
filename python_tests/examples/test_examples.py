"""Every example runs as a script, with settings that take seconds, and says what it should."""

import importlib.util
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "shapes.py")
TRAINING = ("accelerate", "torchmetrics", "pydantic", "sklearn")
NEEDS = {
    "finetune_folder.py": TRAINING,
    "foreign_loop.py": ("PIL",),
    "lightning_style.py": ("PIL", "lightning"),
    "own_task.py": TRAINING,
    "timm_style.py": ("PIL", "timm"),
    "two_processes.py": TRAINING,
}


def skip_without(script):
    missing = [name for name in NEEDS.get(script, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{script} needs {', '.join(missing)}")


@pytest.fixture
def run_example(run_python):
    """Its output; it must end well and leave no complaint of a process that ended badly."""

    def run(script, *arguments, launcher=()):
        skip_without(script)
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = run_python(*launcher, EXAMPLES / script, *arguments, timeout=300, **environment)
        assert done.returncode == 0, done.stderr + done.stdout
        assert "terminate called" not in done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    return run


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available() or os.name != "posix", reason="torch is built without distributed"
)


def test_your_own_model(run_example):
    output = run_example("your_own_model.py", "--steps", 6)
    assert "replaced 3 convolutions, left 0" in output
    assert float(re.search(r"largest difference .*: (\S+)", output)[1]) < 1e-4


def same_accuracies(output, count=2):
    """How often the words "accuracy n%" are in the output with the same n, as deploying must not change it."""
    found = re.findall(r"accuracy ([\d.]+)%", output)
    return len(found) == count and len(set(found)) == 1


def test_foreign_loop(run_example):
    output = run_example("foreign_loop.py", "--epochs", 1, "--images", 64)
    assert "trained: 115029 parameters" in output
    assert "deployed: 33236 parameters" in output
    assert same_accuracies(output)


@needs_distributed
def test_foreign_loop_in_two_processes_and_bfloat16(run_example):
    output = run_example("foreign_loop.py", "--epochs", 1, "--images", 64, "--amp", launcher=TORCHRUN)
    assert len(re.findall("epoch 1 ", output)) == 1
    assert same_accuracies(output)


def test_timm_style(run_example):
    output = run_example("timm_style.py", "--epochs", 2, "--images", 32, "--batch-size", 16)
    assert "replaced 20 convolutions, left 0" in output
    assert same_accuracies(output, 3)


def test_lightning_style(run_example):
    output = run_example("lightning_style.py", "--epochs", 1, "--images", 64)
    assert same_accuracies(output)


@needs_distributed
def test_two_processes(run_example, tmp_path):
    arguments = ("--epochs", 2, "--folder", tmp_path / "run")
    first = run_example("two_processes.py", *arguments, launcher=TORCHRUN)
    weights = re.search(r"2 processes, weights (\w{12}), (\w{12})", first)
    assert weights[1] == weights[2]
    # It is done: nothing is trained again, by one process either.
    second = run_example("two_processes.py", *arguments).splitlines()
    assert second[0] == "goes on after step 44"
    assert second[1:] == [*first.splitlines()[:-1], f"1 processes, weights {weights[1]}"]


CONVS = ("stem.conv", "stages.0.0.conv")


def test_finetune_folder(run_example, tmp_path):
    output = run_example("finetune_folder.py", "--epochs", 1, "--work", tmp_path / "work")
    assert "parameters are trained, in 15 steps" in output
    assert len(re.findall(r"test/\w+/\d+\.png: \w+ \d+%, \w+ \d+%", output)) == 6

    from repkern.train.trained import load_trained

    before = load_trained(tmp_path / "work/pretraining/run").model
    after = load_trained(tmp_path / "work/run").model
    assert [len(before.head.bias), len(after.head.bias)] == [3, 4]
    stem, inner = ((before.get_submodule(name).weight, after.get_submodule(name).weight) for name in CONVS)
    bound = 64 * torch.finfo(torch.float32).eps * stem[0].abs().max()
    assert (stem[0] - stem[1]).abs().max() <= bound, "the frozen stem was trained"
    assert (inner[0] - inner[1]).abs().max() > 1000 * bound


def test_own_task(run_example):
    output = run_example("own_task.py", "--epochs", 2)
    assert "stopped: SIGTERM after step 68" in output
    assert "goes on after step 68, with a DyRepBlock" in output
    assert "the same bits in 113 of 113 tensors" in output


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch, capsys):
    skip_without(script)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert end.value.code == 0
    assert f"examples/{script}" in capsys.readouterr().out, "the help shows no command to run it"


@pytest.mark.parametrize(("script", "package"), [("timm_style.py", "timm"), ("lightning_style.py", "lightning")])
def test_a_missing_package_is_named(script, package, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.parametrize("script", [*SCRIPTS, "shapes.py"])
def test_is_short_and_in_the_readme(script):
    assert len((EXAMPLES / script).read_text().splitlines()) < 120
    assert f"`{script}`" in (EXAMPLES / "README.md").read_text()
