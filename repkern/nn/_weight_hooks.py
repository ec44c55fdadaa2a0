"""Weights that a module's own hooks compute: torch's pruning, weight norm and spectral norm of the older kind.

Such a hook writes `module.weight` before the module's forward, so that after an optimizer step the attribute is what
the last forward used. Who reads a weight without calling the module reads it through here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["bias_in_forward", "current_bias", "current_weight", "is_weight_hook", "weight_in_forward"]


def current_weight(module: nn.Module) -> Tensor:
    """`module.weight` as the module's next forward in eval mode would use it, with gradient; nothing is changed.

    Power iterations of spectral norms stand still. None where the module has None. ValueError when a hook that is none
    of torch's computes the weight: what the next forward would use cannot be known.
    """
    value: Tensor = _current(module, "weight")
    return value


def current_bias(module: nn.Module) -> Tensor | None:
    """`module.bias`, likewise."""
    value: Tensor | None = _current(module, "bias")
    return value


def weight_in_forward(module: nn.Module) -> Tensor:
    """`module.weight` for a forward that does not call the module: what its own forward would do first is done.

    In train mode that advances power iterations. ValueError as `current_weight`.
    """
    value: Tensor = _in_forward(module, "weight")
    return value


def bias_in_forward(module: nn.Module) -> Tensor | None:
    """`module.bias`, likewise."""
    value: Tensor | None = _in_forward(module, "bias")
    return value


def is_weight_hook(hook: Any) -> bool:
    """Whether this forward pre-hook is one of torch's that compute a parameter."""
    return isinstance(hook, BasePruningMethod | SpectralNorm | WeightNorm)


def _current(module: nn.Module, name: str) -> Any:
    if "parametrizations" in module._modules and module.training:
        with _parametrizations_in_eval(module):
            return getattr(module, name)
    if not module._forward_pre_hooks:
        return getattr(module, name)
    hooks = _hooks(module, name)
    targets = [_target(hook) for hook in hooks]
    before = {target: vars(module)[target] for target in targets if target in vars(module)}
    try:
        for hook, target in zip(hooks, targets, strict=True):
            setattr(module, target, _computed(hook, module))
        return getattr(module, name)
    finally:
        for target in targets:
            vars(module).pop(target, None)
        vars(module).update(before)


def _in_forward(module: nn.Module, name: str) -> Any:
    if module._forward_pre_hooks:
        for hook in _hooks(module, name):
            if _belongs_to(_target(hook), name):  # others run when their own tensor is asked for
                hook(module, ())
    return getattr(module, name)


def _hooks(module: nn.Module, name: str) -> list[Any]:
    """torch's hooks that compute a parameter of `module`, in calling order."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if is_weight_hook(hook)]
    if name in vars(module) and vars(module)[name] is not None and name not in map(_target, hooks):
        others = [getattr(hook, "__name__", type(hook).__name__) for hook in module._forward_pre_hooks.values()]
        raise ValueError(
            f"the {name} of this {type(module).__name__} is not a parameter but a tensor that a hook computes "
            f"({', '.join(others)}), so what the next forward would use is not known: make it a parameter first"
        )
    return hooks


def _belongs_to(target: str, name: str) -> bool:
    return target == name or target.startswith(f"{name}_")


def _target(hook: Any) -> str:
    name: str = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
    return name


def _computed(hook: Any, module: nn.Module) -> Tensor:
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(module)
    value: Tensor
    value = hook.compute_weight(module, False) if isinstance(hook, SpectralNorm) else hook.compute_weight(module)
    return value


@contextlib.contextmanager
def _parametrizations_in_eval(module: nn.Module) -> Iterator[None]:
    """Some, as the spectral norm of the newer kind, change their buffers when they are read in train mode."""
    parts = {part: part.training for part in module._modules["parametrizations"].modules()}  # type: ignore[union-attr]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, training in parts.items():
            part.training = training
