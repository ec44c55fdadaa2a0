"""No CUDA kernel spills or uses more registers than registers.csv grants. REPKERN_TEST_ARCHS: which architectures."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("repkern_registers", Path(__file__).with_name("registers.py"))
assert _spec is not None
assert _spec.loader is not None
registers = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = registers
_spec.loader.exec_module(registers)

ARCHS = os.environ.get("REPKERN_TEST_ARCHS", "90a").split()
MARGIN = 8  # registers are handed out in eights


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", registers.sources(), ids=lambda path: path.stem)
@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills_and_within_the_budget(arch: str, source: Path) -> None:
    budget = registers.read_budget()
    usages = registers.measure(arch, source)
    assert usages, f"the assembler reported no kernel of {source.name}"
    for usage in usages:
        assert usage.stack_bytes == 0, f"{usage.kernel} on sm_{arch} spills: {usage.stack_bytes} bytes of stack"
        granted = budget.get((arch, usage.kernel))
        assert granted is not None, f"{usage.kernel} has no row for sm_{arch} in {registers.BUDGET.name}"
        assert usage.registers <= granted + MARGIN, f"{usage.kernel}: {usage.registers} registers, budget {granted}"


def test_the_report_is_read() -> None:
    report = """\
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90a'
ptxas info    : Function properties for _Z6kernelv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers
"""
    (usage,) = registers._parse("90a", report)
    assert (usage.registers, usage.stack_bytes) == (42, 16)
