"""A bar while methods are timed, on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["progress_of"]


@contextlib.contextmanager
def progress_of(layers: int, wanted: bool | None) -> Iterator[Callable[[], None]]:
    """Yields the function to call after each layer. wanted: None shows a bar where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if wanted is False or (wanted is None and not console.is_terminal):
        yield lambda: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("timing layers", total=layers)
        yield lambda: bar.advance(task)
