"""One run folder for all processes of a training: rank 0 chooses and locks it, the others are told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from repkern.train.distributed import Runtime
from repkern.train.recipe import Recipe
from repkern.train.runs import Run, RunError

__all__ = ["share_run"]

# What the processes have settled before they know which run it is.
_SETTLED = ("device", "precision", "strategy", "compile")


@contextlib.contextmanager
def share_run(
    runtime: Runtime, recipe: Recipe, opened: Callable[[], contextlib.AbstractContextManager[Run[Recipe]]]
) -> Iterator[Run[Recipe]]:
    """The run that `opened` opens at rank 0, in every process; only rank 0 holds its lock and has notes.

    recipe: what `runtime` was made for. RunError in every process when rank 0 cannot open one, and when the run that
    is continued wants another device, precision, strategy or compilation than the processes were started with.
    """
    if not runtime.is_main:
        told = runtime.broadcast(None)
        if told is None:
            raise RunError("rank 0 could not open the run folder; it says why")
        path, text, resumed = told
        run = Run(Path(path), Recipe.model_validate_json(text), resumed)
        _check(recipe, run)
        yield run
        return
    with contextlib.ExitStack() as stack:
        try:
            run = stack.enter_context(opened())
        except BaseException:
            runtime.broadcast(None)
            raise
        runtime.broadcast((str(run.path), run.recipe.to_json(), run.resumed))
        _check(recipe, run)
        yield run


def _check(recipe: Recipe, run: Run[Recipe]) -> None:
    wanted, stored = recipe.train.model_dump(), run.recipe.train.model_dump()
    wrong = [f"train.{name} {stored[name]}, not {wanted[name]}" for name in _SETTLED if stored[name] != wanted[name]]
    if wrong:
        raise RunError(f"the unfinished run {run.path} has {', '.join(wrong)}; start the processes with the same")
