"""How training shows: bars on a terminal; elsewhere a line an epoch, and one a minute in long epochs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from repkern.cli._console import percent
from repkern.train import Callback, Trainer
from repkern.train.meters import metrics_so_far

__all__ = ["training_progress"]

_REFRESH = 0.5  # seconds between looks at the metrics of a running epoch
_LINE = 60.0  # seconds between lines inside an epoch


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


class _Speed:
    """Images a second over the training steps since it was last asked, and how long the rest takes."""

    def __init__(self, trainer: Trainer) -> None:
        self._per_step = 0.0
        self.restart(trainer)

    def restart(self, trainer: Trainer) -> None:
        """Leave out what happened since: a test, a checkpoint."""
        self._at, self._step = time.monotonic(), trainer.step

    def look(self, trainer: Trainer) -> tuple[float, float]:
        """(images a second, seconds left)."""
        now, steps = time.monotonic(), trainer.step - self._step
        if steps:
            measured = (now - self._at) / steps
            self._per_step = measured if not self._per_step else 0.7 * self._per_step + 0.3 * measured
        self._at, self._step = now, trainer.step
        left = (trainer.total_steps - trainer.step) * self._per_step
        return trainer.data.batch_size / self._per_step if self._per_step else 0.0, left


class _Watching(Callback):
    """What bars and lines share: when to look at a running epoch, and how fast it is."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._next = 0.0
        self._speed: _Speed | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        self._speed = _Speed(trainer)
        self._next = time.monotonic() + self._every

    def on_step_end(self, trainer: Trainer) -> None:
        if time.monotonic() >= self._next and self._speed is not None:
            self._look(trainer, *self._speed.look(trainer))
            self._next = time.monotonic() + self._every

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self._speed is not None:
            self._speed.restart(trainer)

    def _look(self, trainer: Trainer, speed: float, left: float) -> None:
        raise NotImplementedError


class _Bar(_Watching):
    def __init__(self, progress: Progress, label: str) -> None:
        super().__init__(_REFRESH)
        self._progress = progress
        self._label = label
        self._task = TaskID(0)
        self._tested = ""

    def on_fit_start(self, trainer: Trainer) -> None:
        super().on_fit_start(trainer)
        self._task = self._progress.add_task(
            self._label, total=trainer.total_steps, completed=trainer.step, text=_place(trainer)
        )
        if trainer.rows:
            self.on_epoch_logged(trainer, trainer.rows[-1])

    def on_step_end(self, trainer: Trainer) -> None:
        self._progress.advance(self._task)
        super().on_step_end(trainer)

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        super().on_epoch_logged(trainer, row)
        if "test_accuracy" in row:
            self._tested = f"  test {percent(row['test_accuracy'])}"
        # As at the end of the epoch: the next has not begun.
        self._show(f"epoch {row['epoch']:>2}/{trainer.epochs}", row, row["images_per_second"], trainer)

    def on_note(self, trainer: Trainer, text: str) -> None:
        self._progress.console.print(text, style="yellow", markup=False, soft_wrap=True)

    def _look(self, trainer: Trainer, speed: float, left: float) -> None:
        self._show(_place(trainer), metrics_so_far(trainer.task, trainer.meters_state()), speed, trainer)

    def _show(self, place: str, metrics: Mapping[str, Any], speed: float, trainer: Trainer) -> None:
        memory = f"  {_memory(trainer)}" if self._progress.console.width >= 120 else ""
        text = f"{place}{_figures(metrics)}{self._tested}  {speed:,.0f} images/s{memory}"
        self._progress.update(self._task, text=text)


class _Lines(_Watching):
    def __init__(self, console: Console, label: str) -> None:
        super().__init__(_LINE)
        self._console = console
        self._label = label

    def on_fit_start(self, trainer: Trainer) -> None:
        super().on_fit_start(trainer)
        if trainer.epoch:
            self._console.print(f"{self._label:<6} epochs 1 to {trainer.epoch} are already done")

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        super().on_epoch_logged(trainer, row)
        test = (
            f"  test loss {row['test_loss']:.4f}  test accuracy {percent(row['test_accuracy'])}"
            if "test_accuracy" in row
            else ""
        )
        place, loss = f"epoch {row['epoch']:>2}/{trainer.epochs}", f"train loss {row['train_loss']:.4f}"
        self._say(f"{place}  {loss}{test}  {row['seconds']:.1f} s")

    def on_note(self, trainer: Trainer, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _look(self, trainer: Trainer, speed: float, left: float) -> None:
        step = trainer.step - trainer.epoch * trainer.steps_per_epoch
        figures = _figures(metrics_so_far(trainer.task, trainer.meters_state()))
        self._say(
            f"{_place(trainer)}  step {step}/{trainer.steps_per_epoch}{figures}  {speed:,.0f} images/s  "
            f"{_memory(trainer)}  {_time(left)} left"
        )

    def _say(self, text: str) -> None:
        self._console.print(f"{self._label:<6} {text}", soft_wrap=True)


def _place(trainer: Trainer) -> str:
    return f"epoch {min(trainer.epoch + 1, trainer.epochs):>2}/{trainer.epochs}"


def _figures(metrics: Mapping[str, Any]) -> str:
    """The loss and the accuracy in training, as far as they are known."""
    loss = f"  loss {metrics['train_loss']:.4f}" if "train_loss" in metrics else ""
    return loss + (f"  accuracy {percent(metrics['train_accuracy'])}" if "train_accuracy" in metrics else "")


def _memory(trainer: Trainer) -> str:
    """The most that torch has taken of the GPU, or what the process has resident."""
    import torch

    if trainer.runtime.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(trainer.runtime.device) / 1e9:.1f} GB"
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return f"{pages * resource.getpagesize() / 1e9:.1f} GB"
    except (ImportError, OSError, ValueError, IndexError):  # not Linux
        return ""


def _time(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
