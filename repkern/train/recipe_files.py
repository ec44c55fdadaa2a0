"""Recipes as YAML files: found by name or path, composed over a `base`, changed by `--set`, checked as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from repkern.train.recipe import Recipe
from repkern.train.recipe_schema import find_field, near, suggestion
from repkern.train.recipe_tree import (
    Located,
    Problem,
    RecipeError,
    merged,
    parse_value,
    parse_yaml,
    place_of,
    plain,
    read_text,
)

__all__ = ["Problem", "RecipeError", "list_recipes", "load_recipe", "recipe_from_text", "recipe_path"]

RecipeT = TypeVar("RecipeT", bound=Recipe)

_VERSION = 1
_SUFFIXES = (".yaml", ".yml")
# What a file says about itself: a recipe built on it is another one.
_NOT_INHERITED = ("version", "name", "about", "paper")


def _folder() -> Path:
    return Path(str(resources.files("repkern"))) / "recipes"


def list_recipes(*, hidden: bool = False) -> list[str]:
    """The names of the recipes that come with repkern, sorted. hidden: those that others are built on too (_...)."""
    names = sorted(path.stem for path in _folder().glob("*.yaml"))
    return [name for name in names if hidden or not name.startswith("_")]


def recipe_path(source: str | Path, *, beside: Path | None = None) -> Path:
    """The file of a recipe: a shipped one by its name, any other by its path, relative to the folder `beside`.

    A path is what ends in .yaml or .yml or has a folder in it. RecipeError, with names near it, when there is none.
    """
    text = str(source)
    if not text.strip():
        _fail("a recipe is a name or a path, got an empty text")
    if not _is_path(text):
        if text in list_recipes(hidden=True):
            return _folder() / f"{text}.yaml"
        _fail(f"there is no recipe {text!r}{_other(text, beside)}; `repkern recipes` lists all of them")
    path = Path(text) if beside is None else beside / text
    if path.is_dir():
        _fail(f"{path} is a folder, a recipe is a file")
    try:
        found = path.is_file()
    except ValueError:  # a zero byte
        found = False
    if not found:
        _fail(f"there is no file {str(path)!r}")
    return path


def _is_path(text: str) -> bool:
    return text.endswith(_SUFFIXES) or "/" in text or "\\" in text


def _other(name: str, beside: Path | None) -> str:
    for suffix in _SUFFIXES:
        if ((beside or Path()) / (name + suffix)).is_file():
            return f" that comes with repkern; did you mean the file {name + suffix}?"
    close = near(name, list_recipes())
    return f"; did you mean {close}?" if close else ""


def load_recipe(
    source: str | Path,
    changes: Sequence[str] = (),
    *,
    kind: type[RecipeT] = Recipe,  # type: ignore[assignment]
) -> RecipeT:
    """The recipe at a path or of a name, over what its `base` says, with `changes` ("optimizer.lr=0.05") on top.

    Mappings are merged field by field, everything else is replaced. RecipeError names every problem with its file,
    line and field: unknown fields (and what may have been meant), values of another kind, circles of bases, keys that
    are there twice, and files that a newer version wrote. kind: with further fields.
    """
    path = recipe_path(source)
    tree = _composed(path, ())
    return _checked(_changed(tree, changes, kind), path.stem, kind)


def recipe_from_text(text: str, name: str = "", changes: Sequence[str] = (), *, folder: Path | None = None) -> Recipe:
    """As `load_recipe`, from the text of a file. folder: what a relative `base` is relative to."""
    shown = name or "recipe"
    tree = _based(parse_yaml(text, shown), shown, folder, ())
    return _checked(_changed(tree, changes, Recipe), name, Recipe)


def _composed(path: Path, chain: tuple[Path, ...]) -> Located:
    """The file at `path` over all it is built on. chain: the files that led here."""
    resolved = path.resolve()
    if resolved in chain:
        names = [_shown(file) for file in (*chain[chain.index(resolved) :], resolved)]
        _fail(f"recipes are built on each other in a circle: {' -> '.join(names)}")
    shown = _shown(path)
    return _based(parse_yaml(read_text(path, shown), shown), shown, path.parent, (*chain, resolved))


def _based(tree: Located, shown: str, folder: Path | None, chain: tuple[Path, ...]) -> Located:
    fields = dict(tree.value)
    _check_version(fields, shown)
    base = fields.pop("base", None)
    own = Located(fields, tree.place)
    if base is None:
        return own
    if not isinstance(base.value, str):
        raise RecipeError([Problem(base.place, "base", f"is the name or the path of a recipe, got {plain(base)!r}")])
    try:
        path = recipe_path(base.value, beside=folder)
    except RecipeError as error:
        raise RecipeError([Problem(base.place, "base", problem.text) for problem in error.problems]) from None
    below = _composed(path, chain)
    inherited = {name: value for name, value in below.value.items() if name not in _NOT_INHERITED}
    return merged(Located(inherited, below.place), own) if fields else Located(inherited, below.place)


def _check_version(fields: Mapping[str, Located], shown: str) -> None:
    version = fields.get("version")
    if version is not None and type(version.value) is int and version.value > _VERSION:
        raise RecipeError(
            [
                Problem(
                    version.place,
                    "version",
                    f"{version.value} is newer than this repkern, which reads recipes of version {_VERSION}: "
                    "pip install -U repkern",
                )
            ]
        )


def _changed(tree: Located, changes: Sequence[str], kind: type[Recipe]) -> Located:
    problems = []
    for change in changes:
        place = f"--set {change}"
        name, equals, text = change.partition("=")
        path = name.strip().split(".")
        try:
            if not equals or not name.strip():
                raise RecipeError([Problem(place, "", "needs a field and a value: --set optimizer.lr=0.05")])
            keys = find_field(kind, path)
            tree = merged(tree, _nested(keys, parse_value(text, place)))
        except KeyError as error:
            problems.append(Problem(place, error.args[0], _unknown(error.args[0].split("."), kind)))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return tree


def _nested(keys: Sequence[str], value: Located) -> Located:
    for key in reversed(keys):
        value = Located({key: value}, value.place)
    return value


def _checked(tree: Located, name: str, kind: type[RecipeT]) -> RecipeT:
    values = plain(tree)
    values.setdefault("name", name)
    try:
        # As JSON, because there alone can "no text where a number is needed" and "a list is a tuple" be had together.
        return kind.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems = [_problem(tree, found, kind) for found in error.errors(include_url=False)]
        raise RecipeError(sorted(problems, key=_by_line)) from None


def _by_line(problem: Problem) -> tuple[str, int]:
    file, _, line = problem.place.rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.place, 0)


def _problem(tree: Located, found: Mapping[str, Any], schema: type[Recipe]) -> Problem:
    path: tuple[str | int, ...] = tuple(found["loc"])
    field = ".".join(map(str, path))
    return Problem(place_of(tree, path), field, _reason(path, found, schema))


def _reason(path: Sequence[str | int], found: Mapping[str, Any], schema: type[Recipe]) -> str:
    kind, got = found["type"], found["input"]
    if kind == "extra_forbidden":
        return _unknown(path, schema)
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        return _choose(found["ctx"]["expected"], got)
    if kind == "union_tag_not_found":
        return f"needs a name: what it is, got {got!r:.80}"
    if kind == "union_tag_invalid":
        return f"name {_choose('one of ' + found['ctx']['expected_tags'], found['ctx']['tag'])}"
    if kind in ("value_error", "assertion_error"):
        return str(found["ctx"]["error"])
    message = str(found["msg"]).replace("Input should be ", "must be ")
    for theirs, ours in (
        ("an object", "a mapping of fields"),
        ("a valid array", "a list"),
        ("Tuple should", "should"),
        ("Dictionary should", "should"),
        ("a valid string", "a text"),
    ):
        message = message.replace(theirs, ours)
    return f"{message}, got {got!r:.80}"


def _choose(expected: str, got: Any) -> str:
    options = expected.removeprefix("one of ").replace(" or ", ", ").split(", ")
    close = near(str(got), [option.strip("'") for option in options])
    return f"must be {expected}, got {got!r:.80}" + (f"; did you mean {close}?" if close else "")


def _unknown(path: Sequence[str | int], schema: type[Recipe]) -> str:
    meant = suggestion(schema, path)
    return "there is no such field" + (f"; did you mean {meant}?" if meant else "")


def _shown(path: Path) -> str:
    """Short, where the place is known: shipped recipes by their place in the package, others relative to here."""
    for root, prefix in ((_folder(), Path("repkern/recipes")), (Path.cwd(), Path())):
        try:
            return (prefix / path.resolve().relative_to(root.resolve())).as_posix()
        except ValueError:
            continue
    return str(path)


def _fail(text: str) -> NoReturn:
    raise RecipeError([Problem("", "", text)])
