"""The benchmark that kills trainings, on a few of them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"
# A copy of the tests without the repository has no benchmarks.
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="no benchmarks beside the tests")


def test_killed_trainings_end_as_one_that_was_not(run_python):
    result = run_python(SCRIPT, "--runs", 2, "--variants", "writing", "--epochs", 1, "--dry-run", timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert sum("killed at" in line and line.endswith("identical") for line in lines) == 2
    assert lines[-1].endswith("2 of 2 bit-identical")
    assert "(writing)" in lines[-2]


def test_a_difference_is_seen(monkeypatch):
    spec = importlib.util.spec_from_file_location("kills", SCRIPT)
    kills = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kills", kills)  # dataclasses look there
    spec.loader.exec_module(kills)
    one = {"a": torch.zeros(3), "b": [1, {"c": torch.ones(2)}], "d": 0.5}
    assert not list(kills.differences(one, {"a": torch.zeros(3), "b": [1, {"c": torch.ones(2)}], "d": 0.5}))
    other = {"a": torch.zeros(3).double(), "b": [1, {"c": torch.tensor([1.0, 1.0 + 1e-7])}], "d": 0.5 + 2e-16}
    assert list(kills.differences(one, other)) == ["a", "b.1.c", "d"]
    assert list(kills.differences([1], [1, 2])) == [""]
    assert list(kills.differences({"x": 1}, {"x": True})) == ["x"]
