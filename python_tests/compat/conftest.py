"""`--whole` (or REPKERN_COMPAT=all): every block in every geometry with every tool."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="the whole compatibility matrix (or REPKERN_COMPAT=all)")


def is_whole(config):
    return config.getoption("--whole", default=False) or os.environ.get("REPKERN_COMPAT") == "all"


def pytest_generate_tests(metafunc):
    if "cell" not in metafunc.fixturenames:
        return
    from compat_matrix.selection import cells

    chosen = cells(is_whole(metafunc.config))
    metafunc.parametrize(
        "cell", chosen, ids=[f"{tool.run.__name__}-{case.kind.__name__}-{case.name}" for tool, case in chosen]
    )


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter, config):
    """How many cells of the matrix there were."""
    counts = {
        outcome: sum("::test_cell[" in report.nodeid for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed")
    }
    if sum(counts.values()):
        extent = "whole" if is_whole(config) else "a slice"
        text = f"compatibility matrix ({extent}): {counts['passed']} cells as documented, {counts['failed']} not"
        terminalreporter.write_line(text)
