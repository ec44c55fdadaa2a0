"""Resident memory of a process: what inference needs, everything counted that passes torch's allocator or not."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

from repkern.bench.rivals import Contestant, Job

__all__ = ["MemoryContestant", "high_water_bytes", "measured_here", "reset_high_water", "resident_bytes"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RUNS = 3


def measured_here() -> bool:
    """Whether this system tells a process its high-water mark and lets it be reset (Linux)."""
    try:
        high_water_bytes()
        reset_high_water()
    except (OSError, ValueError):
        return False
    return True


def resident_bytes() -> int:
    """VmRSS now."""
    return _status("VmRSS")


def high_water_bytes() -> int:
    """VmHWM: the most resident memory since the start or the last `reset_high_water`."""
    return _status("VmHWM")


def reset_high_water() -> None:
    """Give freed memory back to the system, and let the high-water mark start again from what is resident now."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _RESET.write_text("5")


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s*(\d+) kB", _STATUS.read_text())
    if match is None:
        raise ValueError(f"{_STATUS} has no {name}")
    return int(match[1]) * 1024


class MemoryContestant:
    """For `Remote`, in a fresh process: a contestant whose memory is watched from behind the imports on."""

    def __init__(self, name: str, threads: int) -> None:
        self._contestant = Contestant(name, threads)
        reset_high_water()
        self._imports = resident_bytes()

    def prepare(self, job: Job) -> tuple[int, int]:
        """Bytes over the imports: the most during a few runs of the ready network, and during its preparation."""
        self._contestant.prepare(job)
        preparation = high_water_bytes() - self._imports
        reset_high_water()
        for _ in range(_RUNS):
            self._contestant.run()
        return high_water_bytes() - self._imports, preparation
