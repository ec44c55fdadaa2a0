"""DiverseBranchBlock: KxK, 1x1, 1x1 and average pooling, 1x1 and KxK, each with norms, summed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn._pointwise import pointwise_map
from repkern.nn._weight_hooks import current_weight, weight_in_forward
from repkern.nn.branch_sum import Branch
from repkern.nn.fold import KernelBias, compose_sequential, fuse_bn, pad_to
from repkern.nn.geometry import Geometry, Pair, check_geometry
from repkern.nn.identity_pointwise import IdentityPointwise
from repkern.nn.inner_norm import BORDERS, InnerNorm, averaged, averaging_kernel, convolve
from repkern.nn.normed_sum import NormedSumBlock, plain_conv

__all__ = ["DiverseBranchBlock"]


class DiverseBranchBlock(NormedSumBlock):
    """activation( BN(KxK) + BN(1x1) + BN(average(pad(BN(1x1)))) + BN(KxK(pad(BN(1x1)))) ).

    The block of paper 2103.13425 (Sec. 3.3), for any odd K, stride, padding, dilation, groups and padding_mode.
    Depthwise (groups = Ci = Co) there is no 1x1 branch, and the average is that of the input; K = 1 has neither a 1x1
    nor an average branch. padding: None keeps the size at stride 1.
    internal_channels: Cm of the 1x1-KxK branch; default Ci, or 2 Ci when groups >= Co. identity_reduce: whether its 1x1
    is stored as the deviation from an identity, which it starts as; default: when Cm = Ci. single_init: start with the
    KxK branch alone (the last norms of the others scale by 0).
    border: the padding between a norm and what follows. "exact": what the norm makes of zero at this moment, batch
    statistics in training, with gradient, so that training and eval mode compute the same convolution. "released": by
    the running statistics after this batch, without gradient, as the authors' code; for their checkpoints.
    recompute: "cheap" makes the 1x1 and averaged maps again in the backward instead of keeping them.
    Submodules: `dense`, `pointwise`, `avg` (its 1x1), `avg_inner_bn`, `avg_bn`, `reduce`, `reduce_bn`, `expand`,
    `expand_bn`, `dense_bn`, `pointwise_bn`; an absent one is None.
    Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    identity_bn = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: str | Pair | None = None,
        dilation: Pair = 1,
        groups: int = 1,
        *,
        activation: nn.Module | None = None,
        padding_mode: str = "zeros",
        recompute: str = "none",
        internal_channels: int | None = None,
        identity_reduce: bool | None = None,
        single_init: bool = False,
        border: str = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        if border not in BORDERS:
            raise ValueError(f"border must be one of {', '.join(BORDERS)}, got {border!r}")
        super().__init__(geometry, activation, None, None, recompute, device, dtype)
        self.border = border
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make_plain_branches(geometry, factory)
        self._make_average_branch(geometry, factory)
        self._make_expand_branch(geometry, internal_channels, identity_reduce, factory)
        if single_init:
            for norm in (self.pointwise_bn, self.avg_bn, self.expand_bn):
                if norm is not None:
                    nn.init.zeros_(norm.weight)

    @property
    def _is_depthwise(self) -> bool:
        return self.groups == self.in_channels == self.out_channels

    def _make_plain_branches(self, geometry: Geometry, factory: dict[str, Any]) -> None:
        ci, co, groups = geometry.in_channels, geometry.out_channels, geometry.groups
        self.dense = plain_conv(geometry, **factory)
        self.dense_bn = nn.BatchNorm2d(co, **factory)
        present = not self._is_depthwise and self.kernel_size[0] > 1
        self.pointwise = nn.Conv2d(ci, co, 1, self.stride, groups=groups, bias=False, **factory) if present else None
        self.pointwise_bn = nn.BatchNorm2d(co, **factory) if present else None

    def _make_average_branch(self, geometry: Geometry, factory: dict[str, Any]) -> None:
        ci, co, groups = geometry.in_channels, geometry.out_channels, geometry.groups
        present = self.kernel_size[0] > 1
        has_pointwise = present and not self._is_depthwise
        self.avg = nn.Conv2d(ci, co, 1, groups=groups, bias=False, **factory) if has_pointwise else None
        self.avg_inner_bn = nn.BatchNorm2d(co, **factory) if has_pointwise else None
        self.avg_bn = nn.BatchNorm2d(co, **factory) if present else None

    def _make_expand_branch(
        self, geometry: Geometry, internal: int | None, identity: bool | None, factory: dict[str, Any]
    ) -> None:
        ci, co, groups = geometry.in_channels, geometry.out_channels, geometry.groups
        if internal is None:
            internal = ci if groups < co else 2 * ci
        if internal < 1 or internal % groups:
            raise ValueError(f"internal_channels (={internal}) must be a positive multiple of groups (={groups})")
        self.internal_channels = internal
        self.reduce: nn.Conv2d = (
            IdentityPointwise(ci, internal, groups, factory)
            if (internal == ci if identity is None else identity)
            else nn.Conv2d(ci, internal, 1, groups=groups, bias=False, **factory)
        )
        self.reduce_bn = nn.BatchNorm2d(internal, **factory)
        # It reads a map that is padded already.
        self.expand = plain_conv(
            geometry._replace(in_channels=internal, padding=(0, 0), padding_mode="zeros"), **factory
        )
        self.expand_bn = nn.BatchNorm2d(co, **factory)

    def _branches(self) -> list[Branch]:
        branches = [Branch(self.dense_bn, self.dense)]
        if self.pointwise is not None:
            branches.append(Branch(self.pointwise_bn, self._pointwise_map, cheap=True))
        if self.avg_bn is not None:
            branches.append(Branch(self.avg_bn, self._average_map(), cheap=True))
        remake = self.recompute == "cheap"
        inner = InnerNorm(self, self.reduce, self.reduce_bn, self.expand_bn, self.border, remake)
        make = functools.partial(inner.convolve, weight=weight_in_forward(self.expand), groups=self.groups)
        return [*branches, Branch(self.expand_bn, make)]

    def _pointwise_map(self, x: Tensor) -> Tensor:
        assert self.pointwise is not None
        return pointwise_map(self.pointwise, self._centre(x))

    def _average_map(self) -> Callable[[Tensor], Tensor]:
        channels = self.out_channels
        kernel = averaging_kernel(channels, self.kernel_size[0], self.dense.weight)
        if self.avg is None or self.avg_inner_bn is None or self.avg_bn is None:
            return functools.partial(convolve, self, weight=kernel, groups=channels)
        inner = InnerNorm(self, self.avg, self.avg_inner_bn, self.avg_bn, self.border)
        return functools.partial(inner.convolve, weight=kernel, groups=channels)

    def _folded_others(self, like: Tensor) -> list[KernelBias]:
        k, dtype = self.kernel_size[0], like.dtype
        folded: list[KernelBias] = []
        if self.pointwise is not None and self.pointwise_bn is not None:
            folded.append(fuse_bn(pad_to(current_weight(self.pointwise).to(dtype), k), None, self.pointwise_bn))
        if self.avg_bn is not None:
            folded.append(fuse_bn(*self._folded_average(like), self.avg_bn))
        reduce = self.reduce.kernel() if isinstance(self.reduce, IdentityPointwise) else current_weight(self.reduce)
        inner = fuse_bn(reduce.to(dtype), None, self.reduce_bn)
        composed = compose_sequential(inner, (current_weight(self.expand).to(dtype), None), groups=self.groups)
        folded.append(fuse_bn(*composed, self.expand_bn))
        return folded

    def _folded_average(self, like: Tensor) -> KernelBias:
        k = self.kernel_size[0]
        if self.avg is None or self.avg_inner_bn is None:
            return averaging_kernel(self.out_channels, k, like), None
        return averaged(fuse_bn(current_weight(self.avg).to(like.dtype), None, self.avg_inner_bn), k)
