"""ConvNormAct: the plain convolution, its BatchNorm and an activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn.geometry import Pair, check_geometry
from repkern.nn.normed_sum import set_kernel, wide_kernel
from repkern.nn.orepa_block import _NormedBlock

__all__ = ["ConvNormAct"]


class ConvNormAct(_NormedBlock):
    """activation(BatchNorm(conv(x))): what the other blocks are compared with, deployed as they are.

    kernel_size: any odd K >= 1. padding: None keeps the size at stride 1. activation: a module or None.
    Submodules: `conv` (nn.Conv2d without bias), `bn`, `activation`.
    Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        super().__init__(geometry, activation, device, dtype)
        options: dict[str, Any] = {"padding_mode": padding_mode, "device": device, "dtype": dtype}
        self.conv = nn.Conv2d(*geometry[:7], bias=False, **options)

    def _convolved(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def _wide_kernel(self) -> Tensor:
        return wide_kernel(self.conv)

    def _set_kernel(self, weight: Tensor) -> None:
        set_kernel(self.conv, weight)
