"""Polite requests to stop: Ctrl-C, SIGTERM (schedulers) and SIGUSR1 (preemption)."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repkern.train.state import Position

__all__ = ["Interrupted", "StopNow", "StopRequest", "stop_requests"]

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class Interrupted(Exception):  # not an error: a request that was honoured
    """Ctrl-C or a signal arrived after `step` steps. `saved` is the newest checkpoint, None when there is none."""

    def __init__(self, signal: str, position: Position, saved: Path | None) -> None:
        super().__init__(f"{signal} after step {position.step}")
        self.signal, self.position, self.saved = signal, position, saved


class StopNow(Exception):
    """A signal arrived and the current step is done."""


class StopRequest:
    """`name` of the signal that arrived, "" as long as none did."""

    def __init__(self) -> None:
        self.name = ""

    def __bool__(self) -> bool:
        return bool(self.name)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside the block those signals are noted in what is yielded; a second Ctrl-C raises KeyboardInterrupt at once.

    Signals reach the main thread only: in another thread nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.name = signal.Signals(number).name

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    # What was ignored stays so: a shell does that for jobs in the background, which a Ctrl-C is not meant for.
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None: a handler that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
