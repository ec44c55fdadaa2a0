"""`repkern train` with data workers: interruptions and dead workers leave a run that continues, and no process."""

import multiprocessing
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("no_process_is_left")

TINY = """
base: digits_plain
about: a network that is trained in two seconds
model: {options: {widths: [6, 8], blocks: 1}}
data: {limit: 256, augment: [{name: affine}], workers: 1}
train: {epochs: 2, batch_size: 32, threads: 1}
"""


@pytest.fixture(autouse=True)
def tiny(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def signal_at(monkeypatch):
    """A signal after so many steps, to this process or to its workers."""

    def made(step, number, *, workers=False, all_of_them=False):
        from repkern.cli import _progress

        def on_step_end(self, trainer):
            if trainer.step == step:
                pids = [each.pid for each in multiprocessing.active_children()] if workers or all_of_them else []
                pids += [] if workers else [os.getpid()]
                assert pids
                for pid in pids:
                    os.kill(pid, number)

        monkeypatch.setattr(_progress._Lines, "on_step_end", on_step_end)

    return made


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_stopped_run_continues_to_the_same_weights_with_other_workers(command, tmp_path, signal_at):
    assert command("train", "tiny.yaml", "--out", "whole", "--set", "data.workers=0")[0] == 0
    signal_at(11, signal.SIGTERM)
    assert command("train", "tiny.yaml", "--out", "stopped")[0] == 130
    assert not multiprocessing.active_children()
    signal_at(0, signal.SIGTERM)
    assert command("train", "tiny.yaml", "--out", "stopped", "--resume")[0] == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_signal_to_all_processes_of_a_run_saves_it_too(command, tmp_path, signal_at):
    assert command("train", "tiny.yaml", "--out", "whole")[0] == 0
    signal_at(11, signal.SIGTERM, all_of_them=True)
    code, out, err = command("train", "tiny.yaml", "--out", "stopped")
    assert (code, err) == (130, "")
    assert "Interrupted by SIGTERM" in out
    signal_at(0, signal.SIGTERM)
    assert command("train", "tiny.yaml", "--out", "stopped", "--resume")[0] == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_dead_worker_is_one_line_and_the_run_continues(command, tmp_path, signal_at):
    signal_at(10, signal.SIGKILL, workers=True)
    code, _, err = command("train", "tiny.yaml", "--out", "run")
    assert code == 1
    flat = " ".join(err.split())
    assert "1 of 1 data workers ended: process" in flat
    assert "was killed by SIGKILL" in flat
    assert "The same command continues from the last checkpoint" in flat
    signal_at(0, signal.SIGKILL)
    assert command("train", "tiny.yaml", "--out", "run")[0] == 0
    assert weights(tmp_path / "run")
