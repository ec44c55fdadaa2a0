"""The fields of a recipe as dotted names: what can be set, and what somebody may have meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

__all__ = ["Field", "fields_of", "find_field", "near", "section_in", "suggestion"]

# What other programs call it.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "base_lr": "lr",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "batch": "batch_size",
    "bs": "batch_size",
    "epoch": "epochs",
    "num_epochs": "epochs",
    "num_workers": "workers",
    "arch": "model.name",
    "network": "model.name",
    "dataset": "data.name",
    "path": "root",
    "directory": "root",
    "amp": "precision",
    "smoothing": "label_smoothing",
    "grad_accum": "accumulate",
    "clip_grad": "clip_norm",
    "warmup": "warmup_epochs",
    "pretrained": "checkpoint",
    "scheduler": "schedule.name",
    "opt": "optimizer.name",
}


class Field(typing.NamedTuple):
    """One field: its dotted name, its annotation, and the section it is in."""

    name: str
    annotation: Any
    section: type[BaseModel]

    @property
    def description(self) -> str:
        """What the schema says about it."""
        return self.section.model_fields[self.name.rpartition(".")[2]].description or ""

    @property
    def default(self) -> Any:
        """What it is when a recipe does not say; pydantic's PydanticUndefined where it must."""
        return self.section.model_fields[self.name.rpartition(".")[2]].default


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that values of this annotation are, also an optional one; None for anything else."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    sections = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    return sections[0] if sections else None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[Field]:
    """All fields of a section and of those inside it, in the order of the schema; a section comes before its fields."""
    for name, info in section.model_fields.items():
        yield Field(prefix + name, info.annotation, section)
        inner = section_in(info.annotation)
        if inner is not None:
            yield from fields_of(inner, f"{prefix}{name}.")


def find_field(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    """`path` as keys, one for each mapping on the way: names of parameters with dots in them stay one key.

    KeyError with the dotted path when the schema has no such field.
    """
    keys: list[str] = []
    section: type[BaseModel] | None = root
    for at, part in enumerate(path):
        if section is None or part not in section.model_fields:
            raise KeyError(".".join(path[: at + 1]))
        keys.append(part)
        annotation = section.model_fields[part].annotation
        section = section_in(annotation)
        rest = list(path[at + 1 :])
        if section is None and rest and typing.get_origin(annotation) is dict:
            return keys + (rest if typing.get_args(annotation)[1] is Any else [".".join(rest)])
    return keys


def suggestion(root: type[BaseModel], path: Sequence[str | int]) -> str:
    """The field that somebody who wrote `path` may have meant, dotted, or an empty string."""
    name = str(path[-1])
    within = _section_at(root, path[:-1])
    if within is None and any(isinstance(part, int) for part in path):
        return ""
    prefix = ".".join([*map(str, path[:-1]), ""]) if path[:-1] else ""
    if within is not None:
        wanted = _OTHER_NAMES.get(name, name)
        if wanted in within.model_fields:
            return prefix + wanted
        close = near(name, within.model_fields)
        if close:
            return prefix + close
    everywhere = [field.name for field in fields_of(root)]
    wanted = _OTHER_NAMES.get(name, name)
    same = [field for field in everywhere if field == wanted or field.rpartition(".")[2] == wanted]
    if same:
        return min(same, key=lambda field: field.count("."))
    return near(".".join(map(str, path)), everywhere)


def _section_at(root: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel] | None:
    """The section at a path as pydantic writes it: with numbers in lists, and the name of the member in unions."""
    annotation: Any = root
    for part in path:
        section = section_in(annotation)
        if isinstance(part, int):
            annotation = next(iter(typing.get_args(annotation)), None)
        elif section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
        else:
            annotation = next((member for member in _members(annotation) if _called(member, part)), None)
    return section_in(annotation)


def _members(annotation: Any) -> Sequence[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return typing.get_args(annotation)


def _called(member: Any, name: str) -> bool:
    fields = getattr(member, "model_fields", {})
    return "name" in fields and fields["name"].default == name


def near(name: str, candidates: Any) -> str:
    """The candidate that looks most like `name`, or an empty string."""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)), "")
