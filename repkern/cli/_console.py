"""What commands share: where they print, how they fail, and units that people read."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import typer
from rich.console import Console

__all__ = ["INTERRUPTED", "console", "fail", "megabytes", "milliseconds", "percent", "terminated_like_ctrl_c"]

FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130  # what shells report for Ctrl-C: 128 + SIGINT


def console() -> Console:
    """Standard output: colour and bars on a terminal, plain text in a pipe."""
    return Console(highlight=False)


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Print one line to standard error and leave with `code`."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]Error:[/] {_escaped(message)}")
    raise typer.Exit(code)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def percent(part: float) -> str:
    """0.9915 -> "99.15 %"."""
    return f"{100 * part:.2f} %"


def milliseconds(seconds: float) -> str:
    """Three digits: "41.8 ms"."""
    value = 1000 * seconds
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def megabytes(size: float) -> str:
    """In units of 10**6 bytes: "22.9 MB"."""
    return f"{size / 1e6:.1f} MB"


@contextlib.contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """A polite kill (SIGTERM) ends the block as Ctrl-C does, so that a run stopped by a scheduler can be resumed."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
