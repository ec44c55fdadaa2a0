"""The settings of one training run: checked when made, written beside the results, read back to resume."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from repkern.models.files import parse_json
from repkern.train.files import write_atomically

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """What a run does, apart from the model and the data. ValueError names a value that cannot be.

    `learning_rate` is the peak, reached after `warmup_epochs` and then lowered to zero along a cosine.
    `threads` is part of the settings because the order of a sum, and so its last bit, depends on it.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    label_smoothing: float = 0.0
    seed: int = 0
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "threads"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("learning_rate", self.learning_rate > 0, "positive")
        for name in ("momentum", "label_smoothing"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("weight_decay", "warmup_epochs", "seed"):
            self._require(name, getattr(self, name) >= 0, "zero or more")

    def _require(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. ValueError names settings that are not there, TypeError values of other kinds."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown setting {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
        arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        hints = typing.get_type_hints(cls)
        for name, value in arguments.items():
            if not _is_of(value, hints[name]):
                raise TypeError(f"{name} must be {_shown(hints[name])}, got {value!r:.100}")
        return cls(**arguments)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_atomically(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. ValueError, with the path, when it is something else."""
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"expected a JSON object, got {type(values).__name__}")
            return cls.from_dict(values)
        except OSError as error:
            raise OSError(error.errno, f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} does not hold the settings of a run: {error}") from None

    def differences(self, other: TrainConfig) -> list[str]:
        """One line per setting in which `other` differs: "epochs 24, not 3"."""
        mine, theirs = json.loads(json.dumps(self.to_dict())), json.loads(json.dumps(other.to_dict()))
        return [f"{name} {mine[name]}, not {theirs.get(name)}" for name in mine if mine[name] != theirs.get(name)]


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a setting is of the annotated kind; whole numbers are floats, truth values are no numbers."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, option) for option in typing.get_args(hint))
    if origin is tuple or hint is tuple:
        kinds = [kind for kind in typing.get_args(hint) if kind is not Ellipsis] or [int]
        return isinstance(value, tuple) and all(any(_is_of(item, kind) for kind in kinds) for item in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
