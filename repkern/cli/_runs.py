"""What commands with a run folder share: recipes from options, and what happens when a run is interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from repkern.cli import _console
from repkern.cli._console import INTERRUPTED, WRONG_USE, fail
from repkern.cli._options import Device, chosen_device

if TYPE_CHECKING:
    from repkern.train.recipe import Recipe
    from repkern.train.runs import Run

__all__ = ["recipe_for", "shown", "started", "training_run"]

RecipeT = TypeVar("RecipeT", bound="Recipe")


def recipe_for(
    name: str | Path, kind: type[RecipeT], device: Device, given: Mapping[str, Any], changes: Sequence[str] = ()
) -> tuple[RecipeT, list[str]]:
    """The recipe with the options that the user gave, and the names of those: {"train.epochs": 3}.

    changes: further ones as text, "optimizer.lr=0.05". A device (the option's, or else the recipe's) and a number of
    threads are always settled: a run continues with those it began with. Leaves with 2 for what is wrong.
    """
    import json

    import torch

    from repkern.train.recipe_files import RecipeError, load_recipe

    options = {name: value for name, value in given.items() if value is not None}
    texts = [f"{option}={json.dumps(value)}" for option, value in options.items()]
    try:
        recipe = load_recipe(name, [*changes, *texts], kind=kind)
    except RecipeError as problem:
        fail(str(problem), WRONG_USE)
    where = chosen_device(Device(recipe.train.device) if device is Device.auto else device)
    settled = {"device": where, "threads": recipe.train.threads or torch.get_num_threads()}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=settled)})
    named = [*options, *(change.partition("=")[0].strip() for change in changes)]
    return recipe, [*named, *([] if device is Device.auto else ["train.device"])]


@contextlib.contextmanager
def training_run(
    out: Path,
    recipe: RecipeT,
    mode: Any,
    given: Sequence[str],
    *,
    command: str,
    default: Path,
    to: Any,
    opened: contextlib.AbstractContextManager[Run[RecipeT]] | None = None,
) -> Iterator[Run[RecipeT]]:
    """`open_run`, with every way it can end as an exit code and one line; an interruption says how to continue.

    command, default: of the words that continue the run. to: the console for what is said. opened: what is entered in
    place of `open_run`.
    """
    from repkern.data.errors import DataWorkerError, MissingExtraError
    from repkern.train import CheckpointError, DistributedError, Interrupted, TrainingDivergedError
    from repkern.train.runs import RunError, open_run

    try:
        with _console.terminated_like_ctrl_c(), opened or open_run(out, recipe, mode, given) as run:
            try:
                for note in run.notes:
                    to.print(note, style="dim", soft_wrap=True, markup=False)
                yield run
            except (Interrupted, KeyboardInterrupt) as stop:
                option = "" if out == default else f" --out {out}"
                to.print(
                    f"\n{_what_is_safe(stop)} {shown(run.path)}.\n"
                    f"The same command continues there, and so does: {command} --resume{option}",
                    soft_wrap=True,
                    markup=False,
                )
                raise typer.Exit(INTERRUPTED) from None
            except CheckpointError as error:
                fail(
                    f"{error}. Nothing was changed. Start anew with --fresh, or delete that checkpoint to go on "
                    "from the one before it."
                )
    except RunError as error:
        fail(str(error), WRONG_USE)
    except DataWorkerError as error:
        fail(f"{error}. The same command continues from the last checkpoint.")
    except (MissingExtraError, TrainingDivergedError, DistributedError, OSError, ValueError) as error:
        fail(str(error))


def _what_is_safe(stop: BaseException) -> str:
    from repkern.train import Interrupted

    if not isinstance(stop, Interrupted):
        return "Interrupted. What was saved is safe in"
    place = f"{stop.signal} after step {stop.position.step} (epoch {stop.position.epoch + 1})"
    if stop.saved is None:
        return f"Interrupted by {place}. Nothing of this training could be saved; the rest is in"
    return f"Interrupted by {place}. Every step up to {_step_of(stop.saved)} is safe in"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def started(to: Any, run: Run[Any], what: str, processes: int = 1) -> None:
    """The first lines: what is trained on what, and where the results go."""
    settings = run.recipe.train
    where = "the GPU" if settings.device == "cuda" else f"{settings.threads} CPU threads"
    if processes > 1:
        where = f"{processes} processes, {'a GPU' if settings.device == 'cuda' else where} each"
    to.print(
        f"{'Continuing' if run.resumed else 'Training'} {what} on {where}.\n"
        f"Results go to {shown(run.path)}. Ctrl-C is safe: the same command continues.\n",
        soft_wrap=True,
        markup=False,
    )


def shown(path: Path) -> str:
    """Relative to the current folder where that is shorter to read."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
