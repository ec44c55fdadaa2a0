"""Shared by the block tests."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import repkern
from repkern.nn.branch_weight import BranchWeight
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
    for name, holder in block.named_modules():
        if isinstance(holder, BranchWeight) and name.endswith("scale"):
            torch.nn.init.uniform_(holder.weight, 0.2, 1.0)
        if isinstance(holder, BranchWeight) and name.endswith(("reduce", "prior")):
            torch.nn.init.normal_(holder.weight, 0, 0.1)
    return block


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are tiny, and threads that wait for each other on a busy machine cost far more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def check_two_processes(tmp_path):
    """Run a script beside the tests as ranks 0 and 1, each of which must print "equal"."""

    def check(script, *arguments):
        paths = [str(Path(repkern.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        worker = Path(__file__).with_name(script)
        workers = [
            subprocess.Popen(
                [sys.executable, str(worker), str(rank), "2", str(tmp_path / "store"), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            results = [worker.communicate(timeout=100) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        for worker, (out, err) in zip(workers, results, strict=True):
            assert worker.returncode == 0, err
            assert out.strip() == "equal"

    return check


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


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """Registration order is not calling order, a block is used twice, and one convolution has no norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.stem = nn.Conv2d(3, 6, 7, 2, 3)
        self.body = nn.Sequential(Residual(6), nn.Sequential(Residual(6)))
        self.again = self.body[0]
        self.even = nn.Conv2d(6, 6, 2)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding_mode="reflect", padding=1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = self.again(self.body(torch.relu(self.norm(self.stem(x)))))
        return self.head(torch.relu(self.depthwise(self.even(x)))).mean((2, 3))


def trained_net(model):
    """Statistics that a few batches leave behind; in eval mode."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 16, 16, dtype=next(model.parameters()).dtype))
    return model.eval()


@pytest.fixture
def net():
    """The class of a small network."""
    return Net


@pytest.fixture
def trained():
    return trained_net


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16)
