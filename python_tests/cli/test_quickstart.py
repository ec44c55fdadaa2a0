import json
import os
import re
import signal
import subprocess
import sys
import unicodedata

import pytest

from repkern.cli import _options
from repkern.models.digits import load_digits_net
from repkern.train.trainer import Trainer

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _small(small_recipe):
    options = ["model.options={widths: [6, 8], blocks: 1}", "train.epochs=2", "train.batch_size=256"]
    small_recipe("quickstart", options)


@pytest.fixture
def interrupt_epoch(monkeypatch):
    """Ctrl-C in the given epoch of the second training."""

    def arm(epoch):
        real = Trainer._run_epoch

        def one_epoch(self):
            blocks = any(type(part).__name__ == "OREPAConv2d" for part in self.model.modules())
            if blocks and self.epoch + 1 == epoch:
                raise KeyboardInterrupt
            return real(self)

        monkeypatch.setattr(Trainer, "_run_epoch", one_epoch)
        return lambda: monkeypatch.setattr(Trainer, "_run_epoch", real)

    return arm


def test_the_whole_job_in_a_pipe(command, tmp_path):
    code, out, err = command("quickstart")
    assert (code, err) == (0, "")
    controls = {c for c in out if unicodedata.category(c) == "Cc"} - {"\n"}
    assert not controls
    assert out.count(" epoch ") == 4
    for text in ("test accuracy", "training step", "peak memory", "latency", "largest output difference", "deployed"):
        assert text in out
    folder = tmp_path / "runs" / "quickstart"
    for name in ("recipe.json", "summary.json", "plain.safetensors", "plain/metrics.jsonl", "orepa/metrics.csv"):
        assert (folder / name).is_file()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{100 * summary['accuracy']['orepa']:.2f} %" in out
    load_digits_net(folder / "plain.safetensors")


def test_interrupted_then_the_same_command_continues(command, tmp_path, interrupt_epoch):
    disarm = interrupt_epoch(2)
    code, out, _ = command("quickstart")
    assert code == 130
    assert "repkern quickstart --resume" in out
    assert not (tmp_path / "runs" / "quickstart" / "summary.json").exists()
    disarm()
    code, out, _ = command("quickstart")
    assert code == 0
    assert "Continuing" in out
    assert "plain  epochs 1 to 2 are already done" in out
    assert "OREPA  epochs 1 to 1 are already done" in out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["quickstart"]
    code, out, _ = command("quickstart", "--epochs", "1")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["quickstart", "quickstart-2"]


def test_resume_without_a_run_is_wrong_use(command):
    code, out, err = command("quickstart", "--resume", "--out", "somewhere")
    assert (code, out) == (2, "")
    assert "no unfinished run to resume" in err
    assert len(err.splitlines()) == 1


def test_resume_and_fresh_contradict(command):
    assert command("quickstart", "--resume", "--fresh")[0] == 2


def test_resume_with_other_settings_is_wrong_use(command, interrupt_epoch):
    interrupt_epoch(1)
    command("quickstart")
    code, _, err = command("quickstart", "--resume", "--epochs", "7")
    assert code == 2
    assert "epochs 2, not 7" in err


def damage(folder):
    weights = sorted(folder.glob("checkpoints/*/weights.safetensors"))
    for path in weights:
        path.write_bytes(path.read_bytes()[:100])
    return weights


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(command, tmp_path, interrupt_epoch):
    disarm = interrupt_epoch(1)
    command("quickstart")
    newest = sorted((tmp_path / "runs/quickstart/plain/checkpoints").iterdir())[-1]
    (newest / "weights.safetensors").write_bytes((newest / "weights.safetensors").read_bytes()[:100])
    disarm()
    code, out, err = command("quickstart")
    assert (code, err) == (0, "")
    assert "weights.safetensors is damaged: 100 bytes" in out
    assert "step 5 is used, and the damaged one set aside" in out


def test_only_damaged_checkpoints_are_one_clear_line(command, tmp_path, interrupt_epoch):
    interrupt_epoch(1)
    command("quickstart")
    assert damage(tmp_path / "runs/quickstart/plain")
    code, _, err = command("quickstart")
    assert code == 1
    assert "weights.safetensors is damaged: 100 bytes" in err
    assert "--fresh" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_a_missing_extra_is_one_clear_line(command, monkeypatch, missing):
    real = _options.importlib.util.find_spec
    monkeypatch.setattr(_options.importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    code, out, err = command("quickstart")
    assert (code, out) == (1, "")
    assert err.endswith("pip install 'repkern[quickstart]'\n")
    assert len(err.splitlines()) == 1


def test_no_gpu_is_wrong_use(command, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = command("quickstart", "--device", "cuda")
    assert code == 2
    assert "no CUDA GPU" in err


def test_a_folder_that_cannot_be_made_is_a_failure(command, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command("quickstart", "--out", "file/run")
    assert code == 1
    assert "file" in err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal_leaves_a_resumable_run(tmp_path, number):
    words = ["quickstart", "--epochs", "50", "--threads", "1", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "repkern.cli.main", *words],
        cwd=tmp_path,  # not in the repository, whose sources would hide the package
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a script inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(r"plain +epoch +1/50", line):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (lines, out, err)
    found = re.search(rf"Interrupted by {number.name} after step (\d+) .*Every step up to (\d+) is safe", out)
    assert found is not None, out
    assert found[1] == found[2]
    assert err == ""
    assert (tmp_path / f"run/plain/checkpoints/step_{int(found[1]):08d}").is_dir()


@pytest.mark.parametrize("content", ["", "[1]", '{"train": {"epochs": "many"}}', "[" * 100_000, '{"widths": 3}'])
def test_resume_with_damaged_settings_is_one_line(command, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(content)
    code, _, err = command("quickstart", "--resume", "--out", str(tmp_path / "run"))
    assert code == 1
    assert "recipe.json does not hold the recipe of a run" in err
    assert "Traceback" not in err


def test_a_run_folder_that_cannot_be_is_one_line(command, tmp_path):
    code, _, err = command("quickstart", "--out", "n" * 300)
    assert code in (1, 2)
    assert "too long" in err
    (tmp_path / "file").write_text("")
    code, _, err = command("quickstart", "--out", str(tmp_path / "file" / "run"))
    assert code in (1, 2)
    assert "file" in err
