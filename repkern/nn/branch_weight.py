"""BranchWeight: one trained tensor of a block as a module, so that it is called `weight`, as people expect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn._weight_hooks import weight_in_forward

__all__ = ["BranchWeight", "named_as_now", "require_writable", "tensor_of", "write_weight"]


class BranchWeight(nn.Module):
    """Holds `weight`, a parameter of any shape, and computes nothing.

    Optimizers are often given their groups by a walk over modules that looks for `weight` and `bias`; a parameter of
    another name would never be trained. Scales are stored as vectors [n], so that rules that go by the number of
    dimensions do not decay them. load_state_dict also takes the name that the parameter had before there was a module
    around it (`origin` for `origin.weight`), in any shape of as many values.
    """

    def __init__(self, weight: Tensor, *, requires_grad: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=requires_grad)

    def extra_repr(self) -> str:
        """The shape."""
        return ", ".join(map(str, self.weight.shape))


def tensor_of(holder: nn.Module | None) -> Any:
    """The tensor of a BranchWeight, pruned or normed where it is; None of an absent one."""
    if holder is None:
        return None
    if holder._forward_pre_hooks:
        return weight_in_forward(holder)
    own = holder._parameters.get("weight")  # a third of the time of `holder.weight`, and there are nine in a forward
    return holder.weight if own is None else own


def require_writable(*modules: nn.Module) -> None:
    """ValueError for a module whose `weight` is computed, so that a value written to it would be lost."""
    for module in modules:
        if module._parameters.get("weight") is None:
            raise ValueError(
                f"the weight of a {type(module).__name__} inside the block is not a parameter (pruned, weight-normed "
                "or parametrized), so it cannot be written; make that permanent first (prune.remove, "
                "remove_weight_norm, parametrize.remove_parametrizations)"
            )


@torch.no_grad()
def write_weight(module: nn.Module, value: Tensor) -> None:
    """Give a module this `weight`. ValueError as `require_writable`."""
    require_writable(module)
    own = module._parameters["weight"]
    assert own is not None
    own.copy_(value)


def named_as_now(state: dict[str, Any], prefix: str, block: nn.Module, aliases: dict[str, str]) -> None:
    """In `state`, give the tensors of `block` (whose names start with `prefix`) the names that they have today.

    aliases: names from before -> the BranchWeight that holds the parameter now, where the two differ.
    """
    before = {name: name for name, child in block._modules.items() if isinstance(child, BranchWeight)}
    # A plain convolution has a `weight` too: only beside the block's other parameters is it the one from before.
    if any(f"{prefix}{name}" in state for name in before):
        before |= aliases
    for old, name in before.items():
        holder, key = block._modules.get(name), f"{prefix}{name}.weight"
        given = state.get(f"{prefix}{old}")
        if not isinstance(holder, BranchWeight) or not isinstance(given, Tensor) or key in state:
            continue
        del state[f"{prefix}{old}"]
        fits = given.numel() == holder.weight.numel()
        state[key] = given.reshape(holder.weight.shape) if fits else given
