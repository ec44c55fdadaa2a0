"""YAML with a place for every value: what a message about a recipe needs to name file and line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

__all__ = ["Located", "Problem", "RecipeError", "merged", "parse_value", "parse_yaml", "place_of", "plain", "read_text"]

_TAG = "tag:yaml.org,2002:"
_LARGEST = 1 << 20  # bytes of a file, far more than a recipe has
_MOST = 10_000  # values: aliases can make a small file a huge one


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe. place: file and line, or the option. field: dotted, or empty."""

    place: str
    field: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.field, self.text) if part)


class RecipeError(ValueError):
    """A recipe that cannot be: all its `problems`, each with file, line and field."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems]
        super().__init__(lines[0] if len(lines) == 1 else f"{len(lines)} problems:\n  " + "\n  ".join(lines))


@dataclass(frozen=True)
class Located:
    """A value and where it stands. value: a scalar, a list of Located, or a dict from str to Located."""

    value: Any
    place: str


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2: 1e-3 is a number; no, on, 1:30 and dates are texts."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


_FLOAT = (
    r"[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
for _name, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9]\d*)", list("-+0123456789")),
    ("float", f"(?:{_FLOAT})", list("-+.0123456789")),
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^{_pattern}$"), _first)


def read_text(path: Path, shown: str) -> str:
    """The text of a file. RecipeError for what cannot be read or is too large for a recipe."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError(f"is larger than {_LARGEST} bytes, which a recipe never is")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start})"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    except ValueError as error:  # also a name with a zero byte
        reason = str(error)
    raise RecipeError([Problem(shown, "", reason)])


def parse_yaml(text: str, shown: str) -> Located:
    """The mapping that `text` holds, with the line of every key. RecipeError for anything else.

    No tag is followed, so no code can run. Keys are unique texts.
    """
    tree = _parse(text, shown, lines=True)
    if not isinstance(tree.value, dict):
        found = "nothing" if tree.value is None else _kind(tree.value)
        raise RecipeError([Problem(shown, "", f"a recipe is a mapping of sections (train:, model:, ...), got {found}")])
    return tree


def parse_value(text: str, place: str) -> Located:
    """One value as it would stand in a file: "0.1", "[30, 60]", "{decay: 0.99}". An empty text is the empty string."""
    return _parse(text, place, lines=False) if text.strip() else Located("", place)


def _parse(text: str, shown: str, *, lines: bool) -> Located:
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return Located(None, shown)
            return _Converter(loader, shown, lines).convert(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{shown}:{mark.line + 1}" if lines and mark is not None else shown
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise RecipeError([Problem(place, "", f"is not YAML: {reason}")]) from None
    except RecursionError:
        raise RecipeError([Problem(shown, "", "is nested too deep")]) from None


class _Converter:
    """Nodes of YAML as Located."""

    def __init__(self, loader: _Loader, shown: str, lines: bool) -> None:
        self._loader = loader
        self._shown = shown
        self._lines = lines
        self._count = 0

    def place(self, node: yaml.Node) -> str:
        return f"{self._shown}:{node.start_mark.line + 1}" if self._lines else self._shown

    def convert(self, node: yaml.Node, place: str | None = None) -> Located:
        self._count += 1
        place = place or self.place(node)
        if self._count > _MOST:
            self._fail(place, f"has more than {_MOST} values")
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return Located(self._mapping(node), place)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return Located([self.convert(item) for item in node.value], place)
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.ScalarNode) and kind in ("str", "int", "float", "bool", "null"):
            try:
                return Located(self._loader.construct_object(node), place)
            except (ValueError, KeyError) as problem:
                self._fail(place, f"{node.value!r:.60} is no {kind} ({problem})")
        return self._fail(place, f"the tag {node.tag!r} is not allowed in a recipe")

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Located]:
        found: dict[str, Located] = {}
        for key, value in node.value:
            place = self.place(key)
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (f"{_TAG}str",):
                self._fail(place, "names of fields are texts; put other ones in quotes")
            name = key.value
            if name in found:
                self._fail(place, f"{name} is there twice (first in {found[name].place})")
            found[name] = self.convert(value, place)
        return found

    def _fail(self, place: str, text: str) -> Any:
        raise RecipeError([Problem(place, "", text)])


def merged(base: Located, over: Located) -> Located:
    """`over` laid over `base`: mappings are merged field by field; lists, scalars, null and an empty mapping take the
    place of what was.

    Where both are mappings, the place is that of `over`.
    """
    if not isinstance(base.value, dict) or not isinstance(over.value, dict) or not over.value:
        return over
    fields = dict(base.value)
    for name, value in over.value.items():
        fields[name] = merged(fields[name], value) if name in fields else value
    return Located(fields, over.place)


def plain(tree: Located) -> Any:
    """The values alone."""
    if isinstance(tree.value, Mapping):
        return {name: plain(child) for name, child in tree.value.items()}
    if isinstance(tree.value, list):
        return [plain(child) for child in tree.value]
    return tree.value


def place_of(tree: Located, path: Sequence[str | int]) -> str:
    """Where the value at `path` stands, or the deepest part of it that is there.

    Parts that are not there are passed over: pydantic puts in which member of a union it tried.
    """
    for part in path:
        inside = tree.value
        if isinstance(inside, dict) and part in inside:
            tree = inside[str(part)]
        elif isinstance(inside, list) and isinstance(part, int) and part < len(inside):
            tree = inside[part]
    return tree.place


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "a truth value"}.get(type(value), "a number")
