"""Other launchers, more processes, and several hosts."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")


def test_accelerate_launch(run, tmp_path, jobs_module):
    """Its way for several GPUs, which is torchrun's; for CPUs it wants mpirun. The recipe says cpu."""
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    jobs = [jobs_module.job("launched", given={"max_steps": 2})]
    found = run(jobs, tmp_path, launcher=(*launcher, "--main_process_port", "0", "--mixed_precision", "no"))
    assert [rank["world"] for rank in found["launched"]] == [2, 2]


def test_the_command_with_fsdp2_writes_a_whole_network(launched, run_python, tmp_path):
    """No process has all weights then. The file is tested in one process, which must find what the row says."""
    pytest.importorskip("sklearn")
    changes = ("train.strategy=fsdp2", "train.device=cpu", "train.epochs=1", "train.max_steps=8")
    options = [word for change in changes for word in ("--set", change)]
    folder = tmp_path / "run"
    with launched("-m", "repkern", "train", "digits_orepa", *options, "--out", folder) as command:
        code, err = command.end()
    assert code == 0, err
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    tested = run_python("-m", "repkern", "eval", folder, "--json", timeout=240)
    assert tested.returncode == 0, tested.stderr
    found = json.loads(tested.stdout)
    assert found["test_accuracy"] == pytest.approx(row["test_accuracy"], abs=1e-6)
    assert found["test_loss"] == pytest.approx(row["test_loss"], rel=1e-4)


def test_three_processes_resume_with_the_same_bits(run, tmp_path, jobs_module):
    """Sums of three depend on their order, so the gradients must be summed as before the interruption."""
    job = jobs_module.job
    at = {"folder": str(tmp_path / "run"), "network": "resnet", "given": {"every": 0}}
    jobs = [
        job("whole", network="resnet", given={"every": 0}),
        job("stopped", **at, misfortune=["SIGTERM", 2, 6]),
        job("resumed", **at, resume=True),
    ]
    found = run(jobs, tmp_path, processes=3)
    for whole, resumed in zip(found["whole"], found["resumed"], strict=True):
        assert resumed["began"][2] == 7
        assert resumed["losses"] == whole["losses"][7:]
        assert resumed["digest"] == whole["digest"]


def test_two_hosts(tmp_path):
    """Network namespaces stand for hosts: each has an address and a file system view of its own run folder."""
    script = Path(__file__).parents[3] / "benchmarks" / "two_hosts.sh"
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs Linux, root and the command ip (iproute2)")
    done = subprocess.run(["bash", str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert "two hosts: equal" in done.stdout
