"""Shared by the block tests."""

import importlib.util
from pathlib import Path

import pytest
import torch

from repkern.testing import assert_close


def randomized(block):
    """The block with statistics and affine parameters that are not their initial values."""
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(1)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    for name, parameter in block.named_parameters():
        if name.endswith("scale"):
            torch.nn.init.uniform_(parameter, 0.2, 1.0)
        if name.endswith(("reduce", "prior")):
            torch.nn.init.normal_(parameter, 0, 0.1)
    return block


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are tiny, and threads that wait for each other on a busy machine cost far more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def randomize():
    return randomized


@pytest.fixture
def explicit():
    """The functions of explicit.py: branches computed one by one."""
    spec = importlib.util.spec_from_file_location("explicit", Path(__file__).with_name("explicit.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def same():
    """Equal up to a fraction of the largest value."""

    def check(actual, expected, relative, what="result"):
        assert_close(actual, expected, relative * float(expected.detach().abs().max()), what)

    return check
