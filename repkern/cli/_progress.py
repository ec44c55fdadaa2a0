"""How training shows: bars on a terminal, one line per epoch in a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from repkern.cli._console import percent
from repkern.train import Callback, Trainer

__all__ = ["training_progress"]


@contextlib.contextmanager
def training_progress(console: Console) -> Iterator[Callable[[str], Callback]]:
    """Yields `callback(name)`, which makes the progress of one training visible until the end of the block."""
    if not console.is_terminal:
        yield lambda name: _Lines(console, name)
        return
    columns = (
        TextColumn("[bold]{task.description:<6}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, refresh_per_second=5) as progress:
        yield lambda name: _Bar(progress, name)


class _Bar(Callback):
    def __init__(self, progress: Progress, label: str) -> None:
        self._progress = progress
        self._label = label
        self._task = TaskID(0)

    def on_fit_start(self, trainer: Trainer) -> None:
        self._task = self._progress.add_task(
            self._label, total=trainer.total_steps, completed=trainer.step, text=_text(trainer, None)
        )
        if trainer.rows:
            self._show(trainer, trainer.rows[-1])

    def on_step_end(self, trainer: Trainer) -> None:
        self._progress.advance(self._task)

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self._show(trainer, row)

    def on_note(self, trainer: Trainer, text: str) -> None:
        self._progress.console.print(text, style="yellow", markup=False, soft_wrap=True)

    def _show(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self._progress.update(self._task, text=_text(trainer, row))


def _text(trainer: Trainer, row: dict[str, Any] | None) -> str:
    epoch = 0 if row is None else row["epoch"]
    accuracy = "" if row is None else percent(row["test_accuracy"])
    return f"epoch {epoch:>2}/{trainer.epochs}  test {accuracy:>8}"


class _Lines(Callback):
    def __init__(self, console: Console, label: str) -> None:
        self._console = console
        self._label = label

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.epoch:
            self._console.print(f"{self._label:<6} epochs 1 to {trainer.epoch} are already done")

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self._console.print(
            f"{self._label:<6} epoch {row['epoch']:>2}/{trainer.epochs}  train loss {row['train_loss']:.4f}  "
            f"test loss {row['test_loss']:.4f}  test accuracy {percent(row['test_accuracy'])}  {row['seconds']:.1f} s",
            soft_wrap=True,
        )

    def on_note(self, trainer: Trainer, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
