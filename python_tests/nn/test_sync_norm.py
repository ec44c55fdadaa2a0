"""SyncBatchNorm in a sum of normed branches: two processes with gloo, on the CPU."""

import pytest
import torch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_processes_are_one_batch(check_two_processes):
    check_two_processes("sync_norm_worker.py")
