"""RepVGGBlock: a KxK, a 1x1 and an identity branch, each with a norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn._pointwise import pointwise_map
from repkern.nn._weight_hooks import current_weight
from repkern.nn.branch_sum import Branch
from repkern.nn.custom_l2 import equivalent_l2
from repkern.nn.fold import KernelBias, fuse_bn, pad_to
from repkern.nn.geometry import Geometry, Pair, check_geometry
from repkern.nn.normed_sum import NormedSumBlock, plain_conv

__all__ = ["RepVGGBlock", "RepVGGForm"]


class RepVGGForm(NormedSumBlock):
    """norm(1x1) [+ norm(x)] beside one or several KxK branches: RepVGGBlock, OREPARepVGGBlock and MobileOneBlock.

    Subclasses call `_add_side_branches` at the end of __init__, and add their KxK branches to `_branches`.
    """

    pointwise: nn.Conv2d | None
    pointwise_bn: nn.Module | None

    def _add_side_branches(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Where K = 1 the 1x1 branch would be `dense` once more."""
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        ci, co = self.in_channels, self.out_channels
        self.pointwise = self.pointwise_bn = None
        if self.kernel_size[0] > 1:
            self.pointwise = nn.Conv2d(ci, co, 1, self.stride, groups=self.groups, bias=False, **factory)
            self.pointwise_bn = nn.BatchNorm2d(co, **factory)
        self.identity_bn = nn.BatchNorm2d(co, **factory) if self._keeps_positions else None

    def _branches(self) -> list[Branch]:
        branches = []
        if self.pointwise is not None:
            branches.append(Branch(self.pointwise_bn, self._pointwise_map, cheap=True))
        if self.identity_bn is not None:
            branches.append(Branch(self.identity_bn))
        return branches

    def _pointwise_map(self, x: Tensor) -> Tensor:
        assert self.pointwise is not None
        return pointwise_map(self.pointwise, self._centre(x))

    def _folded_others(self, like: Tensor) -> list[KernelBias]:
        folded: list[KernelBias] = []
        if self.pointwise is not None:
            assert self.pointwise_bn is not None
            pointwise = pad_to(current_weight(self.pointwise).to(like.dtype), self.kernel_size[0])
            folded.append(fuse_bn(pointwise, None, self.pointwise_bn))
        return folded + self._folded_identity(like)


class _OneDense(RepVGGForm):
    """With one KxK branch: `dense` makes its map."""

    def __init__(
        self,
        geometry: Geometry,
        dense: nn.Module,
        activation: nn.Module | None,
        se: int | None,
        post_se: int | None,
        recompute: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(geometry, activation, se, post_se, recompute, device, dtype)
        self.dense = dense
        self.dense_bn = nn.BatchNorm2d(self.out_channels, device=device, dtype=dtype)
        self._add_side_branches(device, dtype)

    def _branches(self) -> list[Branch]:
        return [Branch(self.dense_bn, self.dense), *super()._branches()]


class RepVGGBlock(_OneDense):
    """post_se(activation(se( BN(KxK) + BN(1x1) [+ BN(x) when Ci = Co, stride 1 and the size is kept] ))).

    The block of RepVGG (paper 2101.03697, Sec. 3.2), for any odd K, stride, padding, dilation, groups and padding_mode,
    which the training and the deployed form honour alike (the released training form ignores dilation and
    padding_mode). K = 1 has no 1x1 branch besides `dense`. padding: None keeps the size at stride 1.
    se, post_se: channels that a squeeze-excite before or after the activation reduces to; None for none (RepVGG-D2se:
    se = Co // 16; RepVGGplus: post_se = Co // 4). It stays when the block is fused.
    recompute: "cheap" makes the 1x1 map again in the backward instead of keeping it.
    Submodules: `dense`, `dense_bn`, `pointwise`, `pointwise_bn`, `identity_bn`, `se`, `activation`, `post_se`; one that
    is absent is None. Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    dense: nn.Conv2d

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
        se: int | None = None,
        post_se: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        dense = plain_conv(geometry, device, dtype)
        super().__init__(geometry, dense, activation, se, post_se, recompute, device, dtype)

    def custom_l2(self, *, include_identity: bool = False) -> Tensor:
        """The scalar that replaces the sum of squares of `custom_l2_parameters()`: see `repkern.nn.custom_l2`."""
        return equivalent_l2(
            (current_weight(self.dense), self.dense_bn),
            None if self.pointwise is None else (current_weight(self.pointwise), self.pointwise_bn),
            self.identity_bn if include_identity else None,
            self.groups,
        )

    def custom_l2_parameters(self) -> list[nn.Parameter]:
        """The kernels whose weight decay `custom_l2` replaces."""
        return [p for conv in (self.dense, self.pointwise) if conv is not None for p in conv.parameters()]
