"""CSLABlock: RepOptimizers' Constant-Scale Linear Addition, trained as one convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from repkern.nn._weight_hooks import current_weight, weight_in_forward
from repkern.nn.branch_weight import BranchWeight, write_weight
from repkern.nn.fold import pad_to, wide
from repkern.nn.geometry import Pair, check_dtype, check_geometry
from repkern.nn.normed_sum import plain_conv
from repkern.nn.orepa_block import _NormedBlock

__all__ = ["TRAIN_SCALES", "CSLABlock"]

#: Which scales are trained: all (Hyper-Search), the identity's (the paper's CSLA block), none.
TRAIN_SCALES = ("all", "identity", "none")
_SCALES = ("dense_scale", "pointwise_scale", "identity_scale")


class CSLABlock(_NormedBlock):
    """activation(BN( dense_scale * KxK(x) + pointwise_scale * 1x1(x) [+ identity_scale * x] )).

    The linear block of RepOptimizers (paper 2205.15242, Sec. 3.2), whose training by SGD is what the plain KxK layer
    does with gradients multiplied by dense_scale^2, + pointwise_scale^2 at the centre, + 1 on its diagonal. Everything
    before the norm is linear, so the forward adds the three kernels and runs one convolution, with exact gradients to
    every kernel and scale: no branch map exists. The identity is there when Ci = Co, stride 1 and the size is kept.
    K = 1 has no 1x1 branch besides `dense` (the form of RepOpt-GhostNet). Any odd K, stride, padding (None keeps the
    size at stride 1), dilation, groups and padding_mode.

    train_scales: one of `TRAIN_SCALES`; the other scales are parameters that require no gradient.
    dense_scale, pointwise_scale, identity_scale: initial values, a number or a tensor [Co].
    Submodules: `dense`, `pointwise`, `bn`, and `dense_scale`, `pointwise_scale`, `identity_scale`, each of which holds
    its scale [Co] as `weight`; what is absent is None.
    Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    dense_scale: BranchWeight
    pointwise_scale: BranchWeight | None
    identity_scale: BranchWeight | None

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
        train_scales: str = "identity",
        dense_scale: float | Tensor = 1.0,
        pointwise_scale: float | Tensor = 1.0,
        identity_scale: float | Tensor = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dtype(dtype)
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        if train_scales not in TRAIN_SCALES:
            raise ValueError(f"train_scales must be one of {', '.join(TRAIN_SCALES)}, got {train_scales!r}")
        super().__init__(geometry, activation, device, dtype)
        self.train_scales = train_scales
        self.dense = plain_conv(geometry, device, dtype)
        self.pointwise: nn.Conv2d | None = None
        if self.kernel_size[0] > 1:
            self.pointwise = nn.Conv2d(
                in_channels, out_channels, 1, stride, groups=groups, bias=False, device=device, dtype=dtype
            )
        present = (True, self.pointwise is not None, self._keeps_positions)
        given = (dense_scale, pointwise_scale, identity_scale)
        for name, value, is_there in zip(_SCALES, given, present, strict=True):
            self.register_module(name, self._scale(name, value) if is_there else None)
        # First, where they were before they were modules: optimizers number their states by the parameters' order.
        self._modules = {name: self._modules[name] for name in _SCALES} | self._modules

    def _scale(self, name: str, value: float | Tensor) -> BranchWeight:
        scale = torch.ones_like(self.dense.weight[:, 0, 0, 0]).detach()
        if not isinstance(value, Tensor | float | int) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number or a tensor [{scale.numel()}], got {value!r}")
        start = torch.as_tensor(value, dtype=scale.dtype, device=scale.device).detach()
        if start.device.type != "meta" and not torch.isfinite(start).all():
            raise ValueError(f"{name} must be finite, got {value!r}")
        if start.dim() > 1 or start.numel() not in (1, scale.numel()):
            raise ValueError(f"{name} must be a number or [{scale.numel()}], got {tuple(start.shape)}")
        return BranchWeight(scale * start, requires_grad=self._trains(name))

    def _trains(self, name: str) -> bool:
        return self.train_scales == "all" or (self.train_scales == "identity" and name == "identity_scale")

    def _scales(self) -> dict[str, BranchWeight]:
        """Those that are there."""
        found = {name: self._modules[name] for name in _SCALES}
        return {name: scale for name, scale in found.items() if isinstance(scale, BranchWeight)}

    @property
    def _adds_input(self) -> bool:
        return self.identity_scale is not None

    def summed_kernel(self) -> Tensor:
        """[Co, Ci/g, K, K]: the kernel before the norm, with a gradient to every kernel and trained scale."""
        return self._wide_kernel().to(self.dense.weight.dtype)

    def _wide_kernel(self) -> Tensor:
        """In at least float32, as folded."""
        return self._summed(current_weight)

    def _summed(self, weight_of: Callable[[nn.Module], Tensor]) -> Tensor:
        kernel, scale = wide(weight_of(self.dense)), wide(weight_of(self.dense_scale))[:, None, None, None]
        centre: Tensor | None = None
        if self.pointwise is not None and self.pointwise_scale is not None:
            centre = wide(weight_of(self.pointwise)) * wide(weight_of(self.pointwise_scale))[:, None, None, None]
        if self.identity_scale is not None:
            blocks = torch.diag_embed(wide(weight_of(self.identity_scale)).unflatten(0, (self.groups, -1)))
            diagonal = blocks.flatten(0, 1)[:, :, None, None]
            centre = diagonal if centre is None else centre + diagonal
        if centre is None:
            return kernel * scale
        centre = pad_to(centre, self.kernel_size[0])
        if not kernel.is_contiguous():  # the sum takes the format of what it starts from
            centre = centre.contiguous(memory_format=torch.channels_last)
        return torch.addcmul(centre, kernel, scale)

    def _forward_kernel(self) -> Tensor:
        kernel = self._summed(weight_in_forward)
        return kernel.to(self.dense.weight.dtype)

    def _convolved(self, x: Tensor) -> Tensor:
        return self._conv(x, self._forward_kernel(), None)

    def _set_kernel(self, weight: Tensor) -> None:
        scale = current_weight(self.dense_scale).double()
        if scale.device.type != "meta" and not scale.all():
            raise ValueError("`dense_scale` is 0 for a channel, so no kernel behind it gives the wanted one")
        rest = self._wide_kernel().double() - current_weight(self.dense).double() * scale[:, None, None, None]
        write_weight(self.dense, (weight.double() - rest) / scale[:, None, None, None])
