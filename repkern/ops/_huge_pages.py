"""Memory of large pages, for what kernels go through in dozens of streams: in 4 KiB pages each stream waits for the
processor to look up every page, which takes longest in virtual machines. Linux gives large pages to those who ask.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

__all__ = ["HUGE_PAGE", "advise"]

HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def advise(address: int, size: int) -> None:
    """Ask for large pages where `size` fresh bytes from `address` on cover them whole. Refusal changes nothing."""
    madvise = _madvise()
    begin = -(-address // HUGE_PAGE) * HUGE_PAGE
    end = (address + size) // HUGE_PAGE * HUGE_PAGE
    if madvise is not None and end > begin:
        madvise(begin, end - begin, _MADV_HUGEPAGE)
