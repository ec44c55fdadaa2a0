"""Run folders: which one a command continues, which one it starts, and who is working in one right now."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from repkern.models.files import explained
from repkern.train.files import write_atomically
from repkern.train.recipe import Recipe
from repkern.train.recipe_compare import is_free, recipe_differences, setting, with_settings

__all__ = ["Run", "RunError", "open_run", "read_recipe"]

RecipeT = TypeVar("RecipeT", bound=Recipe)

# Without --resume, what does not make it another run: not a bit of the result depends on it.
_SAME = ("checkpoint", "log", "about", "data.download", "data.workers", "data.memory")
_RECIPE = "recipe.json"
_SUMMARY = "summary.json"


class RunError(ValueError):
    """What was asked for does not go with the run folders that exist. The text says what would."""


@dataclass(frozen=True)
class Run(Generic[RecipeT]):
    """A folder that is ours until the end of the `with` block. `notes` are lines the user should see."""

    path: Path
    recipe: RecipeT
    resumed: bool
    notes: Sequence[str] = ()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, which makes the run a finished one."""
        write_atomically(self.path / _SUMMARY, json.dumps(summary, indent=2) + "\n")


@contextlib.contextmanager
def open_run(
    base: Path, recipe: RecipeT, mode: Literal["auto", "resume", "fresh"] = "auto", given: Sequence[str] = ()
) -> Iterator[Run[RecipeT]]:
    """Choose, make and lock a run folder: `base`, or `base-2`, `base-3`, ... when that is taken.

    auto: continue the newest run with this recipe if it is unfinished, else start a new one.
    resume: continue the newest unfinished run with the recipe it has, but with the settings named in `given` that a
    resumed run may change ("data.root"); RunError when there is none, or when another one ("train.epochs") differs.
    fresh: start a new one. A run is finished when it has a summary.json.
    A new folder in which nothing was done when the block ends with an exception is taken back.
    """
    base = base.absolute()
    if base.exists() and not base.is_dir():
        raise RunError(f"{base} is a file; a run needs a folder")
    notes: list[str] = []
    chosen = None
    if mode == "resume":
        chosen = _unfinished(base)
        recipe = _stored(chosen, recipe, given)
    elif mode == "auto":
        chosen = _same_and_unfinished(base, recipe, notes)
    path = chosen or _next_free(base)
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if chosen is None or mode == "resume":
            write_atomically(path / _RECIPE, recipe.to_json())
        try:
            yield Run(path, recipe, chosen is not None, notes)
        except BaseException:
            if chosen is None:
                _forget(path)
            raise


def _forget(path: Path) -> None:
    """Take back a folder in which nothing was done, so that the next run does not have to be called run-2."""
    with contextlib.suppress(OSError):
        if {file.name for file in path.iterdir()} <= {_RECIPE, ".lock"}:
            (path / _RECIPE).unlink(missing_ok=True)
            (path / ".lock").unlink(missing_ok=True)
            path.rmdir()


def _existing(base: Path) -> list[Path]:
    """`base`, `base-2`, ... that are there, newest first."""
    pattern = re.compile(re.escape(base.name) + r"-([1-9][0-9]*)")
    numbers = [1] if base.is_dir() else []
    if base.parent.is_dir():
        matches = [pattern.fullmatch(path.name) for path in base.parent.iterdir() if path.is_dir()]
        numbers += [int(match[1]) for match in matches if match is not None and int(match[1]) > 1]
    return [_numbered(base, number) for number in sorted(numbers, reverse=True)]


def _numbered(base: Path, number: int) -> Path:
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def _next_free(base: Path) -> Path:
    number = 1
    while (path := _numbered(base, number)).exists() and any(path.iterdir()):
        number += 1
    return path


def _is_unfinished(path: Path) -> bool:
    return (path / _RECIPE).is_file() and not (path / _SUMMARY).exists()


def _unfinished(base: Path) -> Path:
    for path in _existing(base):
        if _is_unfinished(path):
            return path
    raise RunError(f"there is no unfinished run to resume at {base}")


def read_recipe(path: Path, kind: type[RecipeT]) -> RecipeT:
    """The recipe in the run folder `path`. ValueError, with the path, when it is something else."""
    path = path / _RECIPE
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        lines = "; ".join(line.strip() for line in str(error).splitlines() if "https://" not in line)
        raise ValueError(f"{path} does not hold the recipe of a run: {lines[:300]}") from None


def _stored(path: Path, recipe: RecipeT, given: Sequence[str]) -> RecipeT:
    """The recipe in `path`, with what of `given` a resumed run may change as it is in `recipe`."""
    stored = read_recipe(path, type(recipe))
    has, wanted = stored.model_dump(mode="json"), recipe.model_dump(mode="json")
    differing = [name for name in given if setting(has, name) != setting(wanted, name)]
    wrong = [name for name in differing if not is_free(name)]
    if wrong:
        shown = ", ".join(f"{name} {setting(has, name)}, not {setting(wanted, name)}" for name in wrong)
        raise RunError(f"the unfinished run {path} has {shown}; leave that option out, or start anew with --fresh")
    changed = with_settings(has, {name: setting(wanted, name) for name in differing})
    return type(recipe).model_validate_json(json.dumps(changed))


def _same_and_unfinished(base: Path, recipe: RecipeT, notes: list[str]) -> Path | None:
    for path in _existing(base):
        if not (path / _RECIPE).is_file():
            continue
        try:
            stored = read_recipe(path, type(recipe))
        except ValueError as error:
            notes.append(f"Left alone: {error}")
            continue
        differences = recipe_differences(stored.model_dump(mode="json"), recipe.model_dump(mode="json"), free=_SAME)
        if not differences:
            return path if _is_unfinished(path) and not _is_locked(path) else None
        if _is_unfinished(path):
            shown = "; ".join(differences[:6])
            notes.append(f"Left alone: the unfinished run {path.name} has {shown} (--resume continues it)")
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock; RunError when another process does. Without fcntl (Windows) there is no lock."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is working in {path}; wait for it, or choose another --out") from None
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _is_locked(path: Path) -> bool:
    try:
        with _locked(path):
            return False
    except RunError:
        return True
