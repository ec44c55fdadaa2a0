"""OREPARepVGGBlock: RepVGG's three normed branches, the KxK one squeezed from OREPA's."""

from __future__ import annotations

import torch
from torch import nn

from repkern.nn.geometry import Pair, check_geometry
from repkern.nn.orepa import OREPAConv2d
from repkern.nn.repvgg import _OneDense

__all__ = ["OREPARepVGGBlock"]

# The 1x1 branch has a norm of its own here, so it is not part of the squeezed kernel (paper 2204.00826, Sec. 4.3).
_SQUEEZED = ("origin", "avg", "prior", "1x1-KxK", "dw-pw")


class OREPARepVGGBlock(_OneDense):
    """post_se(activation(se( BN(squeezed KxK) + BN(1x1) [+ BN(x) when Ci = Co, stride 1 and the size is kept] ))).

    The OREPA-VGG block of paper 2204.00826, Sec. 4.3, for any odd K >= 3, groups (depthwise included), dilation and
    padding. Submodules: `dense` (OREPAConv2d without its 1x1 branch), `dense_bn`, `pointwise`, `pointwise_bn` and
    `identity_bn` (None when absent). padding: None keeps the size at stride 1. se, post_se, recompute: as RepVGGBlock.
    Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    dense: OREPAConv2d

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
        scaling: str = "vector",
        internal_channels: int | None = None,
        expansion: int = 8,
        se: int | None = None,
        post_se: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        if geometry.kernel_size[0] == 1:
            raise ValueError("kernel_size must be at least 3 (1x1 is a branch of its own), got 1; use OREPABlock")
        dense = OREPAConv2d(
            *geometry[:7],
            bias=False,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
            scaling=scaling,
            internal_channels=internal_channels,
            expansion=expansion,
            branches=_SQUEEZED,
        )
        super().__init__(geometry, dense, activation, se, post_se, recompute, device, dtype)
