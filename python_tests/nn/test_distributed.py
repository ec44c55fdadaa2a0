"""Two processes with gloo."""

import pytest
import torch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
@pytest.mark.parametrize("mode", ["single", "grouped"])
def test_gradients_are_those_of_the_whole_batch(mode, check_two_processes):
    check_two_processes("distributed_worker.py", mode)
