"""How ops behave under torch.func and forward-mode AD: vmap loops over the batch, derivatives go by the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree

__all__ = ["has_tangent", "looped"]


def has_tangent(flat: Sequence[Any]) -> bool:
    """Whether a derivative is carried forward along with one of the tensors (torch.func.jvp, dual numbers)."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in flat)


def looped(op: Any) -> Callable[..., Any]:
    """The vmap rule of `op`: one call an entry of the batch, through all transforms further out."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        if op.mutates:
            raise RuntimeError(f"{op.name} changes its arguments in place and cannot run under torch.func.vmap")
        if info.batch_size == 0:
            raise ValueError(f"{op.name}: torch.func.vmap needs a batch of at least 1, got 0")
        flat, spec = _pytree.tree_flatten(args)
        dims, _ = _pytree.tree_flatten(in_dims)
        entries = []
        for at in range(info.batch_size):
            own = [a if dim is None else a.select(dim, at) for a, dim in zip(flat, dims, strict=True)]
            entries.append(op.overload(*_pytree.tree_unflatten(own, spec)))
        if isinstance(entries[0], Tensor):
            return torch.stack(entries), 0
        stacked = [torch.stack(each) for each in zip(*entries, strict=True)]
        return type(entries[0])(stacked), type(entries[0])([0] * len(stacked))

    return rule
