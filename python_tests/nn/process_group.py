"""Joining the other processes of a test, and leaving them so that the interpreter ends cleanly."""

import contextlib
import gc

import torch
from torch import distributed


@contextlib.contextmanager
def process_group(rank, world, store):
    """A gloo group; what uses it (DistributedDataParallel, handles of work) must be local to a function called inside.

    A thread of gloo frees finished work, with the Python objects that it refers to. If a wrapper keeps such work alive
    until the interpreter ends, the thread can do so without an interpreter, and the process aborts ("terminate called
    without an active exception"), with torch alone too. So: wrappers first, then everybody, then the group.
    """
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    yield
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()
