"""The released implementations' numbers (float64), as the parameter `golden_case` and the fixture `golden`."""

import os
from pathlib import Path

import pytest
import torch

from repkern.testing import assert_close

ROOT = Path(os.environ.get("REPKERN_GOLDEN_DIR", Path(__file__).resolve().parents[2].parent / "shared" / "golden"))
TOLERANCE = 1e-12  # relative to the largest value; all arithmetic is float64 and sums are short


class Golden:
    def read(self, block, case):
        return torch.load(ROOT / block / f"{case}.pt", weights_only=True)

    def check(self, actual, expected, what, *, at_least=0.0):
        """`at_least`: the magnitude of what cancelled to give `expected`, where it says little about the rounding."""
        assert_close(actual, expected, TOLERANCE * max(at_least, float(expected.detach().abs().max())), what)


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are tiny, and threads that wait for each other on a busy machine cost far more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def golden():
    if not ROOT.is_dir():
        pytest.skip("the golden fixtures are absent (REPKERN_GOLDEN_DIR)")
    return Golden()


def pytest_generate_tests(metafunc):
    """A test with the argument `golden_case` runs on every case of its module's GOLDEN_BLOCKS."""
    if "golden_case" not in metafunc.fixturenames:
        return
    found = []
    for block in metafunc.module.GOLDEN_BLOCKS:
        stems = sorted(file.stem for file in (ROOT / block).glob("*.pt")) if ROOT.is_dir() else ["absent"]
        found += [(block, stem) for stem in stems if not stem.endswith(".train") and not stem.startswith("weight_gen")]
    metafunc.parametrize("golden_case", found, ids=["-".join(case) for case in found])
