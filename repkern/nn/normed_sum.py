"""The blocks whose training form is a sum of normed branches and an activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn._weight_hooks import current_weight
from repkern.nn.block import RepBlock
from repkern.nn.branch_sum import RECOMPUTE, Branch, branch_norm_sum
from repkern.nn.branch_weight import write_weight
from repkern.nn.fold import KernelBias, add_branches, fuse_bn, identity_kernel, wide
from repkern.nn.geometry import Geometry, check_dtype
from repkern.nn.kernel_conv import KernelConv2d
from repkern.nn.squeeze_excite import SEBlock

__all__ = ["NormedSumBlock", "plain_conv", "set_kernel", "solve_before_norm", "wide", "wide_kernel"]


def plain_conv(geometry: Geometry, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Conv2d:
    """The KxK convolution of a branch, without bias."""
    check_dtype(dtype)
    options: dict[str, Any] = {"padding_mode": geometry.padding_mode, "device": device, "dtype": dtype}
    return nn.Conv2d(*geometry[:7], bias=False, **options)


def wide_kernel(conv: nn.Module) -> Tensor:
    """The kernel of a branch's convolution for folding: as its next forward in eval mode uses it, at least float32."""
    return conv.wide_kernel() if isinstance(conv, KernelConv2d) else wide(current_weight(conv))


@torch.no_grad()
def set_kernel(conv: nn.Module, weight: Tensor) -> None:
    """Give a branch's convolution this kernel. ValueError where it cannot have one."""
    if isinstance(conv, RepBlock):
        conv.set_equivalent_kernel_bias(weight, None)
    else:
        write_weight(conv, weight)


@torch.no_grad()
def solve_before_norm(
    weight: Tensor, bias: Tensor | None, norm: nn.Module, others: Sequence[KernelBias], name: str
) -> Tensor:
    """The kernel before `norm` [Co, ...] with which norm(kernel) + others = (weight, bias) in eval mode, in float64.

    What the bias lacks goes into the norm's own shift (its running mean where it has none). `name` is the norm's, for
    the ValueError where it scales a channel by 0.
    """
    other_weight, other_bias = add_branches(others) if others else (torch.zeros_like(weight), None)
    mean, shift = norm.running_mean, norm.bias
    assert isinstance(mean, Tensor)
    factor, now = fuse_bn(torch.ones_like(mean, dtype=torch.float64), None, norm)
    if not factor.all():
        raise ValueError(f"`{name}` scales a channel by 0, so no kernel before it gives the wanted one")
    missing = -now if bias is None else bias.double() - now
    if other_bias is not None:
        missing = missing - other_bias.double()
    if isinstance(shift, Tensor):
        shift.add_(missing)
    else:
        mean.sub_(missing / factor)
    return (weight.double() - other_weight.double()) / factor.reshape(-1, *[1] * (weight.dim() - 1))


class NormedSumBlock(SEBlock):
    """post_se(activation(se(sum over branches of norm(branch(x))))).

    One branch is the main one: what the others do not give is its kernel's to give. Subclasses implement `_branches`
    and `_folded_others`, and have `identity_bn` (None where there is no identity).
    """

    #: The dotted names of the main branch's module and of its norm.
    _main = "dense"
    _main_norm = "dense_bn"

    identity_bn: nn.Module | None

    def __init__(
        self,
        geometry: Geometry,
        activation: nn.Module | None,
        se: int | None,
        post_se: int | None,
        recompute: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
        super().__init__(geometry, activation, se, post_se, device, dtype)
        self.recompute = recompute

    def _branches(self) -> list[Branch]:
        raise NotImplementedError

    @property
    def _adds_input(self) -> bool:
        return self.identity_bn is not None

    def _folded_others(self, like: Tensor) -> list[KernelBias]:
        """The convolution of every branch but the main one, in `like`'s dtype and on its device."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Co, H', W']."""
        self._check_input(x)
        if self.se is not None:
            return self._finish(branch_norm_sum(x, self._branches(), recompute=self.recompute, owner=self))
        y = branch_norm_sum(x, self._branches(), self.activation, recompute=self.recompute, owner=self)
        return y if self.post_se is None else self.post_se(y)

    def _folded_sum(self) -> tuple[Tensor, Tensor]:
        """The sum as a convolution, in at least float32."""
        main = fuse_bn(wide_kernel(self.get_submodule(self._main)), None, self.get_submodule(self._main_norm))
        weight, bias = add_branches([main, *self._folded_others(main[0])])
        assert bias is not None
        return weight, bias

    def _fold(self) -> KernelBias:
        weight, bias = self._folded_sum()
        return weight.to(self.kernel_dtype), bias.to(self.kernel_dtype)

    @property
    def kernel_dtype(self) -> torch.dtype:
        """That of the main branch's kernel, and so of the deployed convolution."""
        return next(self.get_submodule(self._main).parameters()).dtype

    def _folded_identity(self, like: Tensor) -> list[KernelBias]:
        """The normed identity branch as a convolution; nothing where there is none."""
        return [] if self.identity_bn is None else [fuse_bn(self._identity_kernel(like), None, self.identity_bn)]

    def _identity_kernel(self, like: Tensor) -> Tensor:
        return identity_kernel(self.in_channels, self.kernel_size[0], self.groups, dtype=like.dtype, device=like.device)

    @torch.no_grad()
    def set_equivalent_kernel_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        """Solve for the main branch's kernel and its norm's shift; exact in eval mode.

        ValueError where that norm scales a channel by 0.
        """
        norm = self.get_submodule(self._main_norm)
        others = self._folded_others(weight.double())
        kernel = solve_before_norm(weight, bias, norm, others, self._main_norm)
        set_kernel(self.get_submodule(self._main), kernel)
