"""What of a training is on disk: its log and its checkpoints. Only rank 0 writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from repkern.train.checkpoint import Checkpoint, CheckpointFolder, DamagedCheckpointError
from repkern.train.metrics import MetricsLog
from repkern.train.recipe import CheckpointRecipe

__all__ = ["Saving"]


class Saving:
    """The files of one training in `folder`; without one nothing is kept. `last` is the newest checkpoint known.

    say: receives what a person should know; a disk that is full must not end a run.
    """

    def __init__(
        self, folder: Path | None, recipe: CheckpointRecipe, *, main: bool, say: Callable[[str], None]
    ) -> None:
        self.last: Path | None = None
        self._recipe, self._main, self._say = recipe, main, say
        self._at = time.monotonic()
        self._log: MetricsLog | None = None
        self._checkpoints: CheckpointFolder | None = None
        if folder is None:
            return
        self._log = MetricsLog(folder)
        self._checkpoints = CheckpointFolder(
            folder / "checkpoints", keep=recipe.keep, keep_every=recipe.keep_every, best=recipe.best
        )
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            self._checkpoints.tidy()

    @property
    def active(self) -> bool:
        """Whether anything is kept."""
        return self._checkpoints is not None

    def path(self, step: int) -> Path | None:
        """Where the checkpoint of `step` is or would be."""
        return None if self._checkpoints is None else self._checkpoints.path(step)

    def begin(self) -> None:
        """Time counts from here on."""
        self._at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is wanted after `step` steps; time is measured by rank 0 alone."""
        if not self.active:
            return False
        if self._recipe.every_steps and step % self._recipe.every_steps == 0:
            return True
        minutes = self._recipe.every_minutes
        return bool(minutes) and self._main and time.monotonic() - self._at >= 60 * minutes

    def write_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace the log."""
        if self._log is None or not self._main:
            return
        try:
            self._log.write(rows)
        except OSError as problem:  # the rows are in the next checkpoint too
            self._say(str(problem))

    def write(self, step: int, checkpoint: Checkpoint) -> Path | None:
        """The folder that was written; None when it was not, which `say` explains. What was there before stays."""
        self._at = time.monotonic()
        if self._checkpoints is None or not self._main:
            return None
        if not all(bool(torch.isfinite(t).all()) for t in checkpoint.weights.values() if t.is_floating_point()):
            self._say(f"step {step}: not saved, because weights or statistics of norms are not finite")
            return None
        try:
            self.last = self._checkpoints.save(step, checkpoint)
        except OSError as problem:
            self._say(f"{problem}. Training goes on, and it will be tried again")
            return None
        return self.last

    def newest(self) -> tuple[int, Checkpoint] | None:
        """The newest checkpoint that is whole, with its step; damaged ones are named.

        DamagedCheckpointError when there are only damaged ones.
        """
        if self._checkpoints is None or not self._main:
            return None
        damaged: DamagedCheckpointError | None = None
        for step in reversed(self._checkpoints.steps()):
            try:
                return step, self._checkpoints.load(step)
            except DamagedCheckpointError as error:
                self._say(f"{error}; the checkpoint before it is used")
                damaged = damaged or error
        if damaged is not None:
            raise damaged
        return None
