"""Metrics for people who watch them elsewhere: TensorBoard and trackio."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from repkern.data.errors import MissingExtraError
from repkern.train.callbacks import Callback
from repkern.train.recipe import LogRecipe

if TYPE_CHECKING:
    from repkern.train.trainer import Trainer

__all__ = ["TensorBoardLog", "TrackioLog", "trackers"]


def trackers(recipe: LogRecipe, folder: Path | None) -> list[Callback]:
    """The callbacks that a recipe asks for. MissingExtraError for a package that is not installed."""
    found: list[Callback] = []
    if recipe.tensorboard and folder is not None:
        found.append(TensorBoardLog(folder / "tensorboard"))
    if recipe.trackio:
        found.append(TrackioLog(recipe.trackio, None if folder is None else folder.name))
    return found


class TensorBoardLog(Callback):
    """Writes every number of an epoch's row to event files in `folder`. Only rank 0 does."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(f"log.tensorboard ({error}): pip install 'repkern[trackers]'") from None
        self._make = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begins a file; a resumed run takes back what an interrupted one wrote after its last checkpoint."""
        if trainer.runtime.is_main:
            self._writer = self._make(str(self._folder), purge_step=trainer.step + 1 if trainer.step else None)

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Writes the row."""
        if self._writer is None:
            return
        for name, value in _numbers(row).items():
            self._writer.add_scalar(_grouped(name), value, row["step"])
        self._writer.flush()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class TrackioLog(Callback):
    """Logs every row to the trackio project `project`. Only rank 0 does. run: its name there."""

    def __init__(self, project: str, run: str | None) -> None:
        try:
            import trackio
        except ImportError as error:
            raise MissingExtraError(f"log.trackio ({error}): pip install 'repkern[trackers]'") from None
        self._trackio = trackio
        self._project, self._run = project, run
        self._open = False

    def on_fit_start(self, trainer: Trainer) -> None:
        """Joins the run of that name, or makes it."""
        if trainer.runtime.is_main:
            settings = trainer.recipe.model_dump(mode="json")
            self._trackio.init(project=self._project, name=self._run, config=settings, resume="allow")
            self._open = True

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Logs the row."""
        if self._open:
            self._trackio.log(_numbers(row), step=row["step"])

    def on_fit_end(self, trainer: Trainer) -> None:
        """Sends what is left."""
        if self._open:
            self._trackio.finish()
            self._open = False


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}


def _grouped(name: str) -> str:
    """TensorBoard draws what shares a prefix into one section: "train_loss" is "train/loss"."""
    part, _, rest = name.partition("_")
    return f"{part}/{rest}" if part in ("train", "test") and rest else name
