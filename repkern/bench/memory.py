"""Peak memory of a piece of work: what torch's profiler saw allocated on the CPU, the allocator's count on a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["kept_bytes", "live_bytes", "peak_bytes"]


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_bytes(run: Callable[[], object], resident: Iterable[Tensor], device: str) -> int:
    """The most bytes alive at once while `run()` runs, `resident` tensors included.

    `resident`: all that lives before and after; `run` must not free any of it. On a CPU every allocation and release
    that passes through torch's allocator is summed in order (what oneDNN or MKL take for themselves does not pass).
    """
    held = live_bytes(resident)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return held + torch.cuda.max_memory_allocated() - before
    changes, _ = _changes(run)
    peak = now = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return held + peak


def kept_bytes(run: Callable[[], object], device: str) -> int:
    """The bytes that `run()` leaves allocated while its result lives: for a forward, what the backward needs.

    Call it once before, so that what is kept from call to call (workspaces) is there already.
    """
    gc.collect()  # what it frees later would count as released by `run`
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated()
        del result
        return after - before
    changes, result = _changes(run)
    del result
    return sum(changes)


def _changes(run: Callable[[], object]) -> tuple[list[int], object]:
    """What `run()` allocates (positive) and frees on the CPU, in order, and its result."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints two lines a run on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [change for _, change in sorted(changes, key=lambda pair: pair[0])], result
