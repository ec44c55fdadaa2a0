"""Fixtures of the optimizer tests: comparison, and the trajectories of the released optimizers."""

import os
from pathlib import Path

import pytest
import torch

from repkern.testing import assert_close

GOLDEN = Path(os.environ.get("REPKERN_GOLDEN_DIR", Path(__file__).resolve().parents[3] / "shared" / "golden"))


@pytest.fixture
def same():
    """Equal up to a fraction of the largest value."""

    def check(actual, expected, relative, what="result"):
        assert_close(actual, expected, relative * float(expected.detach().abs().max()), what)

    return check


@pytest.fixture
def trajectory():
    """A recorded training by name."""

    def read(name):
        path = GOLDEN / "repoptimizer" / f"{name}.pt"
        if not path.is_file():
            pytest.skip("the golden fixtures are absent (REPKERN_GOLDEN_DIR)")
        return torch.load(path, weights_only=True)

    return read
