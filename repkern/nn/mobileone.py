"""MobileOneBlock: several KxK branches, a 1x1 and an identity branch, each with a norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repkern.nn._weight_hooks import current_weight
from repkern.nn.branch_sum import Branch
from repkern.nn.fold import KernelBias, fuse_bn
from repkern.nn.geometry import Pair, check_geometry
from repkern.nn.normed_sum import plain_conv
from repkern.nn.repvgg import RepVGGForm

__all__ = ["MobileOneBlock"]

_MOST_BRANCHES = 256  # the released networks have up to 4; a typing error should not fill the memory


class MobileOneBlock(RepVGGForm):
    """activation(se( sum of n BN(KxK) [+ BN(1x1) when K > 1] [+ BN(x) when Ci = Co, stride 1 and the size is kept] )).

    The block of MobileOne (paper 2206.04040, Sec. 3.2), n = num_conv_branches, for any odd K, stride, padding (None
    keeps the size at stride 1), dilation, groups and padding_mode, which the training and the deployed form honour
    alike (the released training form ignores dilation). se: channels that a squeeze-excite before the activation
    reduces to, None for none (released: Co // 16). recompute: "cheap" makes the 1x1 map, and depthwise ones, again in
    the backward.
    Submodules: the ModuleLists `dense` and `dense_bn`; `pointwise`, `pointwise_bn`, `identity_bn`, `se`, `activation`;
    one that is absent is None. Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    _main = "dense.0"
    _main_norm = "dense_bn.0"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair | None = None,
        dilation: Pair = 1,
        groups: int = 1,
        *,
        activation: nn.Module | None = None,
        padding_mode: str = "zeros",
        recompute: str = "none",
        num_conv_branches: int = 1,
        se: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        if not 1 <= num_conv_branches <= _MOST_BRANCHES:
            raise ValueError(f"num_conv_branches must be from 1 to {_MOST_BRANCHES}, got {num_conv_branches}")
        super().__init__(geometry, activation, se, None, recompute, device, dtype)
        count = range(num_conv_branches)
        self.dense = nn.ModuleList(plain_conv(geometry, device, dtype) for _ in count)
        self.dense_bn = nn.ModuleList(nn.BatchNorm2d(out_channels, device=device, dtype=dtype) for _ in count)
        self._add_side_branches(device, dtype)

    def _branches(self) -> list[Branch]:
        cheap = self.groups == self.in_channels
        dense = [Branch(norm, conv, cheap) for conv, norm in zip(self.dense, self.dense_bn, strict=True)]
        return dense + super()._branches()

    def _folded_others(self, like: Tensor) -> list[KernelBias]:
        folded: list[KernelBias] = []
        for at in range(1, len(self.dense)):
            kernel = current_weight(self.dense[at]).to(like.dtype)
            folded.append(fuse_bn(kernel, None, self.dense_bn[at]))
        return folded + super()._folded_others(like)
