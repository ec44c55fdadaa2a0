"""What happens to a run when one of its processes dies, fails or is told to stop."""

import json
import signal
import time

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")

LOST = "error: another process of this run ended or cannot be reached"


@pytest.fixture
def wait_for():
    def wait(folder, launched, ranks=2):
        while len(list(folder.glob("rank*"))) < ranks:
            assert launched.running, launched.end()
            time.sleep(0.05)

    return wait


def test_a_killed_process_is_told_and_torchrun_resumes(run, start, tmp_path, jobs_module):
    job, lively = jobs_module.job, jobs_module.LIVELY
    killed = job("killed", **lively, folder=str(tmp_path / "run"), resume=True, misfortune=["SIGKILL", 1, 7])
    # Both in one launch: the second life runs the whole training as well, in a folder of its own.
    whole = job("whole", **lively)
    with start([killed, whole], tmp_path, options=("--max-restarts", "1")) as launched:
        code, err = launched.end()
    assert code == 0, err
    assert err.count(LOST) == 1
    assert "Traceback" not in err
    assert "terminate called" not in err
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("killed", "whole")}
    for one, other in zip(found["whole"], found["killed"], strict=True):
        assert other["began"] == [1, 1, 6]
        assert other["digest"] == one["digest"]
        assert other["rows"] == one["rows"]


def test_an_error_in_one_process_ends_the_other(start, tmp_path, jobs_module):
    failing = jobs_module.job("failing", misfortune=["exception", 1, 3])
    with start([failing], tmp_path) as launched:
        code, err = launched.end()
    assert code == 1
    assert err.count(LOST) == 1
    assert err.count("ValueError: this rank has a fault") == 1
    assert "DistributedError" not in err  # one line, no traceback
    assert "terminate called" not in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_torchrun_saves_and_ends_all(start, alone, tmp_path, wait_for, jobs_module, name):
    stopped = jobs_module.job("stopped", folder=str(tmp_path / "run"), misfortune=["wait", -1, 3, str(tmp_path)])
    with start([stopped], tmp_path) as launched:
        wait_for(tmp_path, launched)
        launched.send(getattr(signal, name))
        _, err = launched.end()
    found = json.loads((tmp_path / "stopped.json").read_text())
    assert [rank["interrupted"] for rank in found] == [name, name]
    assert [rank["step"] for rank in found] == [4, 4]
    assert (tmp_path / "run" / "checkpoints" / "step_00000004" / "manifest.json").exists()
    assert "terminate called" not in err
