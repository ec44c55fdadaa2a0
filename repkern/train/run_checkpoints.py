"""Checkpoints of a training by the path that a person gives: a run folder, or one of the folders inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from repkern.train.checkpoint import Checkpoint, CheckpointError, CheckpointFolder

__all__ = ["RunCheckpoint", "is_run", "read_run"]


class RunCheckpoint(NamedTuple):
    """A checkpoint of a training, and where it is."""

    path: Path
    step: int
    checkpoint: Checkpoint

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Those to use: the moving average where there is one."""
        average = self.checkpoint.average
        return self.checkpoint.weights if average is None else average


def is_run(path: Path) -> bool:
    """Whether this is the folder of a training, or one of its checkpoints."""
    return path.is_dir() and ((path / "checkpoints").is_dir() or _is_checkpoint(path))


def _is_checkpoint(path: Path) -> bool:
    return path.name.removeprefix("step_").isdigit() and (path / "manifest.json").is_file()


def read_run(path: Path, which: Literal["best", "last"] = "best") -> RunCheckpoint:
    """A checkpoint of the run folder `path`, verified; or the one whose folder `path` is.

    which: the one with the best test accuracy (the newest when none was tested), or the newest.
    CheckpointError for a folder without checkpoints, and for damaged and foreign ones.
    """
    if _is_checkpoint(path):
        folder, step = CheckpointFolder(path.parent), int(path.name.removeprefix("step_"))
    else:
        folder = CheckpointFolder(path / "checkpoints")
        steps = folder.steps()
        if not steps:
            raise CheckpointError(f"{path} has no checkpoints: give a run folder of `repkern train`")
        best = folder.best() if which == "best" else None
        step = steps[-1] if best is None else best
    return RunCheckpoint(folder.path(step), step, folder.load(step))
