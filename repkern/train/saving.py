"""What of a training is on disk: its log and its checkpoints. Only rank 0 writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from repkern.models.files import explained
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
            with explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._checkpoints.tidy()

    @property
    def active(self) -> bool:
        """Whether anything is kept."""
        return self._checkpoints is not None

    def path(self, step: int) -> Path | None:
        """Where the checkpoint of `step` is or would be."""
        return None if self._checkpoints is None else self._checkpoints.path(step)

    def begin(self, step: int, rows: Sequence[dict[str, Any]]) -> str:
        """Time counts from here on. Returns what is wrong with the folder for a run at `step`, "" when nothing is."""
        self._at = time.monotonic()
        if self._checkpoints is None or self._log is None or not self._main:
            return ""
        later = [other for other in self._checkpoints.steps() if other > step]
        if later:
            return (
                f"{self._checkpoints.path(later[-1])} is later than this run, which is at step {step}: resume it, or "
                "choose another folder"
            )
        try:
            # A folder that cannot be written to should be known now, not after the first epoch.
            self._log.write(rows)
        except OSError as problem:
            return str(problem)
        return ""

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
        try:
            self.last = self._checkpoints.save(step, checkpoint)
        except OSError as problem:
            self._say(f"{problem}. Training goes on, and it will be tried again")
            return None
        return self.last

    def newest(self) -> tuple[int, Checkpoint] | None:
        """The newest checkpoint that is whole, with its step; later ones are damaged, named and set aside.

        DamagedCheckpointError when there are only damaged ones.
        """
        if self._checkpoints is None or not self._main:
            return None
        damaged: list[tuple[int, DamagedCheckpointError]] = []
        for step in reversed(self._checkpoints.steps()):
            try:
                found = self._checkpoints.load(step)
            except DamagedCheckpointError as error:
                damaged.append((step, error))
                continue
            for other, problem in damaged:
                self._say(f"{problem}; step {step} is used, and the damaged one set aside")
                self._checkpoints.set_aside(other)
            return step, found
        if damaged:
            number = f"; so are {len(damaged) - 1} before it" if damaged[1:] else ""
            raise DamagedCheckpointError(f"{damaged[0][1]}{number}, and there is no other")
        return None
