"""Which settings of two runs differ, and which of them a resumed run may change."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["FREE", "is_free", "recipe_differences", "setting", "with_settings"]

#: What moves, saves or shows a training without changing what it computes (but for the last bits of sums, where the
#: number of threads or processes or the device differs).
FREE = (
    *("name", "about", "paper", "checkpoint", "log", "optimizer.scales"),
    *("data.root", "data.download", "data.workers", "data.memory"),
    *("train.device", "train.threads", "train.compile", "train.strategy", "train.accumulate"),
)


def recipe_differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], free: Sequence[str] = FREE) -> list[str]:
    """One line for each setting that differs, apart from those in `free`: "train.epochs 24, not 3" (saved, wanted)."""
    before, after = dict(_flat(saved)), dict(_flat(wanted))
    return [
        f"{name} {before.get(name)!r}, not {after.get(name)!r}"
        for name in {**before, **after}
        if before.get(name) != after.get(name) and not is_free(name, free)
    ]


def is_free(name: str, free: Sequence[str] = FREE) -> bool:
    """Whether `name` is one of `free`, or inside of one."""
    return any(name == field or name.startswith(field + ".") for field in free)


def setting(values: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name, None when it is not there."""
    found: Any = values
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def with_settings(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` with those at the dotted names of `changes` in place of its own."""
    copied = copy.deepcopy(dict(values))
    for name, value in changes.items():
        *path, last = name.split(".")
        inside = copied
        for part in path:
            inside = inside[part]
        inside[last] = value
    return copied


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value
