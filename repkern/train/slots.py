"""The tensors of a network, looked up once: a walk over all modules would be much of what a small step costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ["buffer_slots", "parameter_slots"]


class Slots:
    """Places of tensors, not the tensors: a module that assigns a new buffer in its forward pass is followed."""

    def __init__(self, places: Iterable[tuple[dict[str, Any], str]]) -> None:
        self.places = list(places)

    def tensors(self) -> list[Tensor]:
        """What is there now."""
        return [module[name] for module, name in self.places]


def parameter_slots(model: nn.Module, names: Iterable[str]) -> Slots:
    """Of the parameters with these dotted names."""
    return Slots((model.get_submodule(parent)._parameters, name) for parent, name in map(_split, names))


def buffer_slots(model: nn.Module, names: Iterable[str]) -> Slots:
    """Of the buffers with these dotted names."""
    return Slots((model.get_submodule(parent)._buffers, name) for parent, name in map(_split, names))


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition(".")
    return parent, name
