"""A slice of the fuzzer of block constructions, in processes of its own."""

import importlib.util
import inspect
import re
from pathlib import Path

FUZZER = Path(__file__).with_name("blocks.py")
COUNT = 300


def test_random_constructions(run_python):
    result = run_python(FUZZER, "--blocks", COUNT, "--seed", 7, timeout=300, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    totals = {
        outcome: int(count) for count, outcome in re.findall(r"(\d+) ([a-z ]+)", result.stdout.rpartition(": ")[2])
    }
    assert sum(totals.values()) == COUNT
    assert totals["computed"] >= COUNT // 4
    assert totals["refused"] >= COUNT // 4


def test_every_argument_has_values():
    spec = importlib.util.spec_from_file_location("block_arguments", FUZZER.with_name("block_arguments.py"))
    arguments = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(arguments)
    assert len(arguments.KINDS) >= 18
    for kind in arguments.KINDS:
        assert set(inspect.signature(kind).parameters) <= {*arguments.LEGAL, "activation"}, kind


def test_a_failure_is_found(run_python, tmp_path):
    """A block that computes something else when deployed, and one that ends the process."""
    script = tmp_path / "broken.py"
    script.write_text(
        f"""import os, sys
sys.argv = [{str(FUZZER)!r}]
sys.path.insert(0, {str(FUZZER.parent)!r})
import torch
import blocks
from repkern.nn import RepVGGBlock

class Wrong(RepVGGBlock):
    def forward(self, x):
        return super().forward(x) * 1.001

class Slow(RepVGGBlock):
    def forward(self, x):
        while True:
            pass

for kind in (Wrong, Slow):
    blocks.SECONDS = 1
    blocks.arguments = lambda rng: (kind, dict(in_channels=2, out_channels=2, dtype=torch.float64))
    blocks.work(0, 0, 1)
"""
    )
    lines = run_python(script).stdout.splitlines()
    assert len(lines) == 4, lines
    assert "deployed form differs by" in lines[1]
    assert "Slow: took more than 1 s" in lines[3]
