"""Sums of normed branches: what a multi-branch block computes in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["RECOMPUTE", "Branch", "branch_norm_sum", "norm_scale_shift"]

#: Values of the blocks' option `recompute`: keep every branch's map for the backward, or make the cheap ones again.
RECOMPUTE = ("none", "cheap")


class Branch(NamedTuple):
    """One term of the sum: norm(make(x)).

    norm: a module over the output channels (BatchNorm2d, SyncBatchNorm, any other) or None for none.
    make: the map before the norm as a function of the block's input; None: the input itself.
    cheap: whether making the map again in the backward costs less than keeping it.
    """

    norm: nn.Module | None
    make: Callable[[Tensor], Tensor] | None = None
    cheap: bool = False


def branch_norm_sum(
    x: Tensor, branches: Sequence[Branch], activation: nn.Module | None = None, *, recompute: str = "none"
) -> Tensor:
    """activation(sum over branches of norm(make(x))), with the norms' running statistics updated as torch does.

    x [N, Ci, H, W]; every branch gives [N, Co, H', W'] of one shape and dtype. recompute: one of `RECOMPUTE`.
    """
    if not branches:
        raise ValueError("branch_norm_sum: at least one branch is needed")
    total: Tensor | None = None
    for branch in branches:
        y = x if branch.make is None else branch.make(x)
        y = y if branch.norm is None else branch.norm(y)
        total = y if total is None else total + y
    assert total is not None
    return total if activation is None else activation(total)


def norm_scale_shift(y: Tensor, norm: nn.Module, *, update: bool = True) -> tuple[Tensor, Tensor]:
    """(scale [C], shift [C]) with which `norm` acts on y [N, C, H, W] now: norm(y) = scale * y + shift.

    In train mode from the batch's statistics (differentiable through y), which also update the running ones, unless
    `update` is False (the map is made again for a backward); in eval mode from the running statistics. For norms whose result is then convolved: scaling the kernel is cheaper than
    writing the normalized map. In at least float32.
    """
    own: Any = norm
    wide = torch.promote_types(y.dtype, torch.float32)
    if own.training or own.running_mean is None:
        var, mean = torch.var_mean(y.to(wide), dim=(0, 2, 3), unbiased=False)
        if update:
            with torch.no_grad():
                norm(y)  # updates the running statistics
    else:
        mean, var = own.running_mean.to(wide), own.running_var.to(wide)
    scale = torch.rsqrt(var + own.eps)
    scale = scale if own.weight is None else scale * own.weight.to(wide)
    shift = -mean * scale
    return scale, shift if own.bias is None else shift + own.bias.to(wide)
