"""CSLAConv2d: the branches of a CSLABlock in place of any nn.Conv2d, whatever follows it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn.csla import CSLABlock
from repkern.nn.fold import KernelBias
from repkern.nn.geometry import Pair

__all__ = ["CSLAConv2d"]


class CSLAConv2d(CSLABlock):
    """dense_scale * KxK(x) + pointwise_scale * 1x1(x) [+ identity_scale * x] [+ bias]: CSLABlock without its norm.

    nn.Conv2d's signature and meaning, for a Hyper-Search in a network whose norms stay where they are. train_scales and
    the scales as in `CSLABlock`; there is no activation. Parameters: those of a CSLABlock, and bias [Co] or None.
    Input [N, Ci, H, W] or [Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    has_norm = False

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        train_scales: str = "identity",
        dense_scale: float | Tensor = 1.0,
        pointwise_scale: float | Tensor = 1.0,
        identity_scale: float | Tensor = 1.0,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode=padding_mode,
            train_scales=train_scales,
            dense_scale=dense_scale,
            pointwise_scale=pointwise_scale,
            identity_scale=identity_scale,
            device=device,
            dtype=dtype,
        )
        del self.bn
        own = torch.empty_like(self.dense_scale) if bias else None
        self.register_parameter("bias", None if own is None else nn.Parameter(own))
        if own is not None:
            bound = 1 / math.sqrt(self.dense.weight[0].numel())
            nn.init.uniform_(own, -bound, bound)

    @property
    def _deployed_bias(self) -> bool:
        return self.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        """[(N,) Ci, H, W] -> [(N,) Co, H', W']."""
        return self._conv(x, self.summed_kernel(), self.bias)

    def _fold(self) -> KernelBias:
        return self.summed_kernel(), self.bias

    def adopt_norm(self, norm: nn.Module) -> bool:
        """False: there is no norm inside."""
        return False

    @torch.no_grad()
    def set_equivalent_kernel_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        """Solve for the dense kernel. ValueError for a bias where the block has none, and for a dense_scale of 0."""
        if self.bias is None and bias is not None and bias.any():
            raise ValueError(f"{type(self).__name__} without a bias cannot take over one")
        self._set_kernel(weight)
        if self.bias is not None:
            self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias)

    @torch.no_grad()
    def set_kernel_before_norm(self, weight: Tensor, bias: Tensor | None) -> None:
        """The same: there is no norm inside."""
        self.set_equivalent_kernel_bias(weight, bias)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> CSLAConv2d:
        """A fresh CSLAConv2d with the arguments, dtype and device of `conv`, and other `options`."""
        return cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            conv.weight.device,
            conv.weight.dtype,
            **options,
        )
