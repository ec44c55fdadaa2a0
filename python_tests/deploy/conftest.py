"""Shared by the tests of deployment."""

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are tiny, and threads that wait for each other on a busy machine cost far more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def randomize():
    """A model in eval mode with statistics that are not the initial ones."""

    def randomized(model):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.fill_(1)
        return model.eval().requires_grad_(False)

    return randomized
