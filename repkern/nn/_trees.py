"""Values that hold tensors: mappings, lists, tuples, NamedTuples and dataclasses, nested in any way."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["floating_tensors", "leaves", "map_tensors", "same_structure"]


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """(key, part) of what holds others; None for a leaf."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    return None


def leaves(value: Any) -> Iterator[Any]:
    """Everything in `value` that holds nothing else, in order."""
    items = _items(value)
    if items is None:
        yield value
    else:
        for _, part in items:
            yield from leaves(part)


def floating_tensors(value: Any) -> Iterator[Tensor]:
    """The floating tensors among the leaves, in order."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with change(tensor) in the place of every tensor; objects that hold none that changes are not copied."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):  # plain ones in the words that torch.compile knows
        return type(value)([map_tensors(change, part) for part in value])
    if type(value) is dict:
        return {key: map_tensors(change, part) for key, part in value.items()}
    items = _items(value)
    if items is None:
        return value
    parts = [(key, map_tensors(change, part)) for key, part in items]
    if all(new is old for (_, new), (_, old) in zip(parts, items, strict=True)):
        return value
    return _rebuilt(value, parts)


def _rebuilt(value: Any, parts: list[tuple[Any, Any]]) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(part for _, part in parts)
    if isinstance(value, tuple):
        return type(value)(part for _, part in parts)
    if isinstance(value, Mapping) and not hasattr(value, "__setitem__"):
        return type(value)(dict(parts))  # type: ignore[call-arg]
    new = copy.copy(value)  # with what a subclass holds besides its parts
    for key, part in parts:
        if isinstance(value, Mapping | list):
            new[key] = part
        else:
            object.__setattr__(new, key, part)  # frozen ones too
    return new


def same_structure(one: Any, other: Any) -> bool:
    """Whether both are made of the same types, lengths and keys in the same order, leaves aside."""
    mine, own = _items(one), _items(other)
    if mine is None or own is None:
        return mine is own
    if type(one) is not type(other) or [key for key, _ in mine] != [key for key, _ in own]:
        return False
    return all(same_structure(a, b) for (_, a), (_, b) in zip(mine, own, strict=True))
