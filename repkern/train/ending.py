"""How a program ends that is one of several processes, when another of them failed."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from repkern.train.distributed import DistributedError

__all__ = ["ending_well"]


@contextlib.contextmanager
def ending_well() -> Iterator[None]:
    """Around the main function of a program: a DistributedError is one line on stderr and exit code 1.

    When a process ends in an error, torchrun sends SIGTERM to the others at once. A process that is on its way out with
    an error then says first what it is; any other ends with 128 + the signal's number (`Trainer.fit` handles signals by
    itself: it saves and raises Interrupted).
    """

    def end(number: int, frame: FrameType | None) -> None:
        if sys.exc_info()[0] is None:
            raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if in_main else None
    try:
        yield
    except DistributedError as problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
