"""CSLAConv2d: the branches of a CSLABlock in place of any nn.Conv2d, whatever follows it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from repkern.nn.csla import CSLABlock
from repkern.nn.geometry import Pair
from repkern.nn.kernel_conv import KernelConv2d

__all__ = ["CSLAConv2d"]


class CSLAConv2d(KernelConv2d, CSLABlock):  # type: ignore[misc]
    """dense_scale * KxK(x) + pointwise_scale * 1x1(x) [+ identity_scale * x] [+ bias]: CSLABlock without its norm.

    nn.Conv2d's signature and meaning, for a Hyper-Search in a network whose norms stay where they are. train_scales and
    the scales as in `CSLABlock`; there is no activation. Submodules: those of a CSLABlock but the norm. Parameter: bias
    [Co] or None. `weight` is the summed kernel, and may be written: see `KernelConv2d`.
    Input [N, Ci, H, W] or [Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    _has_parts = True

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
        CSLABlock.__init__(
            self,
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
        own = torch.empty_like(self.dense_scale.weight) if bias else None
        self._register_bias(None if own is None else nn.Parameter(own))
        if own is not None:
            bound = 1 / math.sqrt(self.dense.weight[0].numel())
            nn.init.uniform_(own, -bound, bound)

    def train_kernel(self, wanted: bool = True) -> None:
        """As for any; scales that `train_scales` keeps constant stay so."""
        constant = [s for name, s in self._scales().items() if not self._trains(name)]
        super().train_kernel(wanted)
        for scale in constant:
            scale.weight.requires_grad_(False)

    def kernel(self) -> Tensor:
        """[Co, Ci/g, K, K], with a gradient to every kernel and trained scale."""
        return self.summed_kernel()

    def _solve(self, weight: Tensor) -> None:
        """Solve for the dense kernel. ValueError where dense_scale is 0."""
        self._set_kernel(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[(N,) Ci, H, W] -> [(N,) Co, H', W']."""
        return self._conv(x, self._forward_kernel(), self.bias)
