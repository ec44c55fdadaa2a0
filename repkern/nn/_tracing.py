"""Running a model's forward on proxies, with nothing left behind in its modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Kept", "restored"]

_CONTAINERS = ("_parameters", "_buffers", "_modules")


class Kept:
    """What a forward on proxies stored in modules: `nodes`, those whose values someone may read there later."""

    def __init__(self) -> None:
        self.nodes: set[fx.Node] = set()


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[Kept]:
    """A context after which every module's attributes, and lists and dictionaries among them, are what they were."""
    before = {module: _state(module) for module in model.modules()}
    kept = Kept()
    try:
        yield kept
    finally:
        for module, (attributes, contents) in before.items():
            stored = [value for name, value in vars(module).items() if name not in _CONTAINERS]
            kept.nodes |= {leaf.node for leaf in tree_leaves(stored) if isinstance(leaf, fx.Proxy)}
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                _refill(attributes[name], content)


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    attributes = dict(vars(module))
    return attributes, {name: value.copy() for name, value in attributes.items() if isinstance(value, list | dict)}


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, list):
        value[:] = content
    elif value.keys() != content.keys() or any(value[key] is not content[key] for key in content):
        value.clear()
        value.update(content)
