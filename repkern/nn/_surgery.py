"""Replacing modules inside a model: shared ones once, hooks moved along."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

__all__ = ["move_hooks", "names_of_modules", "replace_modules"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the forward and backward hooks of `old`. Hooks on state_dict know the old layout and stay behind.

    The dictionaries themselves move, so that handles the user holds still remove their hooks.
    """
    for name in _HOOKS:
        new.__dict__[name], old.__dict__[name] = old.__dict__[name], OrderedDict()
    new._is_full_backward_hook, old._is_full_backward_hook = old._is_full_backward_hook, None


def replace_modules(
    root: nn.Module,
    pick: Callable[[str, nn.Module], nn.Module | None],
    *,
    is_leaf: Callable[[nn.Module], bool] = lambda module: False,
) -> nn.Module:
    """Walk `root` in registration order; where `pick(name, module)` gives a module, put it in the old one's place.

    `name` is the dotted path of the first place ("" for the root). A module that sits in several places is picked once
    and its replacement goes to all of them. Replaced modules and leaves are not walked into. Returns the root, or its
    replacement.
    """
    replaced: dict[int, nn.Module] = {}
    keep_alive: list[nn.Module] = []  # an id must not be reused while it is a key

    def visit(name: str, module: nn.Module) -> nn.Module:
        if id(module) in replaced:
            return replaced[id(module)]
        keep_alive.append(module)
        new = pick(name, module)
        replaced[id(module)] = module if new is None else new
        if new is not None:
            move_hooks(module, new)
            return new
        if not is_leaf(module):
            for child_name, child in list(module._modules.items()):
                if child is not None:
                    module._modules[child_name] = visit(f"{name}.{child_name}" if name else child_name, child)
        return module

    return visit("", root)


def names_of_modules(root: nn.Module) -> dict[int, str]:
    """id of every module -> its first dotted name."""
    return {id(module): name for name, module in root.named_modules()}
