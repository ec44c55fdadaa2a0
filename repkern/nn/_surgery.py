"""Replacing modules inside a model: shared ones once, hooks moved along."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repkern.nn._weight_hooks import is_weight_hook

__all__ = ["copied_model", "move_hooks", "names_of_modules", "replace_modules"]

_Module = TypeVar("_Module", bound=nn.Module)

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

    The dictionaries themselves move, so that handles the user holds still remove their hooks. Hooks that compute a
    weight of `old` go: the weight of `new` has what they gave.
    """
    for number, hook in list(old._forward_pre_hooks.items()):
        if is_weight_hook(hook):
            del old._forward_pre_hooks[number]
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


def copied_model(model: _Module) -> _Module:
    """A deep copy, also where modules hold tensors that were computed with gradients, which copy.deepcopy refuses.

    Such are the weights of pruned and of weight-normed layers, made anew before every forward, and maps that a forward
    keeps. The copy has their values, without what they were computed from. ValueError, naming the module, where a
    module still cannot be copied.
    """
    computed = _computed_tensors(model)
    try:
        made = copy.deepcopy(model, dict(computed))
    except Exception as problem:  # what a user's class does when it is copied is unknown
        raise ValueError(
            f"the model cannot be copied because of {_culprit(model, computed)}: {type(problem).__name__}: {problem}; "
            "let the model itself be changed (inplace=True, where there is that option) or first remove what is in the "
            "way (pruning by torch.nn.utils.prune.remove)"
        ) from problem
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in made.named_modules():  # a traced model comes back in train mode
        module.training = modes.get(name, module.training)
    return made


def _computed_tensors(model: nn.Module) -> dict[int, Any]:
    """id of every tensor with a history that a module holds -> its copy."""
    held = (leaf for module in model.modules() for leaf in tree_leaves(dict(vars(module))))
    return {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and t.requires_grad and not t.is_leaf}


def _culprit(model: nn.Module, computed: dict[int, Any]) -> str:
    """The module whose own state cannot be copied, the innermost first."""
    for name, module in reversed(list(model.named_modules())):
        try:
            copy.deepcopy({key: value for key, value in vars(module).items() if key != "_modules"}, dict(computed))
        except Exception:
            return f"{name or 'the root'} ({type(module).__name__})"
    return f"the root ({type(model).__name__})"
