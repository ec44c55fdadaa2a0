"""Figures of trainings in two gloo processes on this machine, each against what it must be.

    python benchmarks/processes.py                 all of them; some minutes
    python benchmarks/processes.py --repeats 20    how often the end of a run is looked at

The trainings are those of python_tests/train/distributed. Exit code 1 when a figure is not what it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "python_tests" / "train" / "distributed"
LOST = "another process of this run ended or cannot be reached"

sys.path[:0] = [str(ROOT), str(SHARED)]
from jobs import EXACT, LIVELY, job  # noqa: E402
from training import train  # noqa: E402


def torchrun(jobs: list[dict[str, Any]], out: Path, *options: str) -> tuple[int, str]:
    """(exit code, stderr) of the jobs in two processes; what came of them is in `out`."""
    plan = out / "plan.json"
    plan.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(SHARED / "worker.py"), str(plan), str(out)], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stderr


def found(out: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((out / f"{name}.json").read_text())


def alone(one: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return train(**{key: value for key, value in one.items() if key != "name"})


def against_one(out: Path) -> list[tuple[str, float, float]]:
    """Losses of 50 steps in float64, and the first gradients in float32, against one process."""
    fifty = job("fifty", given={"epochs": 10}, **EXACT)
    sharded = job("sharded", given={"epochs": 10, "strategy": "fsdp2"}, own_group=True, **EXACT)
    single = job("single", given={"max_steps": 1}, sync=True)
    code, err = torchrun([single, fifty, sharded], out)
    if code:
        raise RuntimeError(err)
    wanted = alone(fifty)[0]["losses"]
    figures = []
    for name, what in (("fifty", "DDP"), ("sharded", "FSDP2")):
        losses = found(out, name)[0]["losses"]
        worst = max(abs(a - b) for a, b in zip(losses, wanted, strict=True))
        figures.append((f"{what}, float64: largest difference of {len(losses)} losses", worst, 1e-9))
    _, ours = alone(single)
    theirs = torch.load(out / "single.pt", weights_only=True)
    error = torch.cat([(theirs[name] - ours[name]).flatten() for name in ours]).norm()
    relative = (error / torch.cat([gradient.flatten() for gradient in ours.values()]).norm()).item()
    return [*figures, ("float32: relative difference of the first gradients", relative, 1e-5)]


def killed(out: Path) -> list[tuple[str, float, float]]:
    """Seconds from the death of rank 1 to the end of rank 0; then torchrun resumes, and bits are compared."""
    run = {"folder": str(out / "run"), "resume": True, "misfortune": ["SIGKILL", 1, 7]}
    code, err = torchrun([job("killed", **LIVELY, **run)], out, "--max-restarts", "1")
    code_whole, err_whole = torchrun([job("whole", **LIVELY)], out)
    if code or code_whole:
        raise RuntimeError(err + err_whole)
    same = [
        one["digest"] == other["digest"] for one, other in zip(found(out, "killed"), found(out, "whole"), strict=True)
    ]
    began = time.monotonic()
    code, alone_err = torchrun([job("dead", **LIVELY, misfortune=["SIGKILL", 1, 7])], out)
    whole = time.monotonic() - began
    return [
        ("killed and resumed by torchrun: processes with other bits", float(same.count(False)), 0),
        ("killed: runs without a clear message", float(LOST not in err) + float(LOST not in alone_err), 0),
        ("killed: seconds of the whole run, from start to the end of the other process", whole, 60),
    ]


def ends(out: Path, repeats: int) -> list[tuple[str, float, float]]:
    """Runs that did not leave with exit code 0 and nothing on stderr but torchrun's own words."""
    bad = 0
    for _ in range(repeats):
        code, err = torchrun([job("short", given={"max_steps": 2})], out)
        bad += code != 0 or "terminate called" in err or "Traceback" in err
    return [(f"unclean ends of {repeats}", float(bad), 0)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    good = True
    for measure in (against_one, killed, lambda out: ends(out, repeats)):
        with tempfile.TemporaryDirectory() as folder:
            for what, value, most in measure(Path(folder)):
                good &= value <= most
                print(f"{what}: {value:.3g} (at most {most:g}){'' if value <= most else '  TOO MUCH'}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
