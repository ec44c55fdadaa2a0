"""What commands share: where they print, how they fail, and units that people read."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table

__all__ = [
    "INTERRUPTED",
    "console",
    "fail",
    "megabytes",
    "milliseconds",
    "percent",
    "print_pairs",
    "terminated_like_ctrl_c",
    "warn",
]

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


def warn(message: str) -> None:
    """Print one line to standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold yellow]Warning:[/] {_escaped(message)}")


def print_pairs(to: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Two columns, the second with markup; on a terminal long texts wrap inside theirs, in a pipe a row is one line."""
    if not to.is_terminal:
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            to.print(f"{name:<{width}}  {text}", soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    to.print(table)


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
    """A polite kill (SIGTERM) ends the block as Ctrl-C does, so that a run stopped by a scheduler can be resumed.

    On its way out with an error the process goes on: torchrun sends SIGTERM when another process of the run has failed,
    and what this one has to say about it should be read.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if sys.exc_info()[0] is None:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
