"""The branches with a norm in their middle: 1x1, norm, padding, then a KxK convolution or average pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from repkern.nn._affine_norm import affine_norm
from repkern.nn._norm_state import uses_batch
from repkern.nn.block import RepBlock
from repkern.nn.branch_sum import norm_scale_shift
from repkern.nn.fold import KernelBias, response_to_constant
from repkern.nn.recompute import Recompute, current_tape

__all__ = ["BORDERS", "InnerNorm", "averaged", "averaging_kernel", "bordered", "convolve"]

#: Values of the blocks' option `border`: what the padding around a normed map holds.
BORDERS = ("exact", "released")


def averaging_kernel(channels: int, kernel_size: int, like: Tensor) -> Tensor:
    """[C, 1, K, K] of 1 / K^2, at least float32: average pooling as a depthwise convolution, which can be dilated."""
    wide = torch.promote_types(like.dtype, torch.float32)
    value = torch.full((1, 1, 1, 1), 1 / kernel_size**2, dtype=wide, device=like.device)
    return value.expand(channels, 1, kernel_size, kernel_size)


def averaged(pointwise: KernelBias, kernel_size: int) -> KernelBias:
    """The K x K convolution that is the 1x1 ([Co, Ci/g, 1, 1], bias) and average pooling of its result."""
    weight, bias = pointwise
    return (weight / kernel_size**2).expand(-1, -1, kernel_size, kernel_size), bias


def bordered(block: RepBlock, y: Tensor) -> Tensor:
    """y [N, C, H, W] with the block's padding around it."""
    height, width = block._pad
    if max(block._pad) == 0:
        return y
    return functional.pad(y, (width, width, height, height)) if block.padding_mode == "zeros" else block._padded(y)


def convolve(block: RepBlock, y: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """y [N, Cm, H, W] convolved at the block's stride, padding and dilation, in y's dtype."""
    weight = weight.to(y.dtype)
    bias = None if bias is None else bias.to(y.dtype)
    if block.padding_mode == "zeros":
        return functional.conv2d(y, weight, bias, block.stride, block._pad, block.dilation, groups)
    return functional.conv2d(block._padded(y), weight, bias, block.stride, 0, block.dilation, groups)


class InnerNorm(NamedTuple):
    """conv(pad(norm(pointwise(x)))), where neither the normed nor the padded map is written.

    With norm(y) = scale * y + shift and a border of norm(0) = shift, that is conv(y) with zero padding and the kernel
    scaled per input channel, plus a constant per output channel. Where the kernel has more values than the map (deep
    layers), the map is scaled instead. outer: the norm that follows. border: of `BORDERS`.
    remake: whether pointwise(x) is made again in the backward instead of kept.
    """

    block: RepBlock
    pointwise: Callable[[Tensor], Tensor]
    norm: nn.Module
    outer: nn.Module
    border: str
    remake: bool = False

    def convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """x [N, Ci, H, W], weight [Co, Cm/g, K, K] of `groups` groups -> [N, Co, H', W']."""
        released = self.border == "released" and self.block.padding_mode == "zeros"
        map_size = x.numel() // x.shape[1] * weight.shape[1] * groups
        if not released and map_size >= weight.numel():
            return self._made(self.pointwise, x, lambda y: self._with_scaled_kernel(y, weight, groups))
        borders: list[Tensor] = []
        return self._made(
            lambda x: self._above_border(x, borders),
            x,
            lambda z: convolve(self.block, z, weight, self._constant(weight, borders[0], groups), groups),
        )

    def bordered(self, x: Tensor) -> Tensor:
        """pad(norm(pointwise(x))) itself, for what is no convolution of one kernel."""
        borders: list[Tensor] = []
        z = self._above_border(x, borders)
        return bordered(self.block, z) + borders[0][:, None, None].to(z.dtype)

    def _made(self, make: Callable[[Tensor], Tensor], x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.remake or not _can_remake(x):
            return then(make(x))
        again = Recompute(self.block)
        y = again.make(make, x)
        with again.dropping():
            return then(y)

    @property
    def _constants_vanish(self) -> bool:
        return isinstance(self.outer, _BatchNorm) and uses_batch(self.outer)

    def _constant(self, weight: Tensor, border: Tensor, groups: int) -> Tensor:
        """What the border's value on the whole map gives."""
        if self._constants_vanish:
            # Its gradient is zero: spare the backward a pass over the map.
            weight, border = weight.detach(), border.detach()
        return response_to_constant(weight.to(border.dtype), border, groups=groups)

    def _with_scaled_kernel(self, y: Tensor, weight: Tensor, groups: int) -> Tensor:
        scale, shift = norm_scale_shift(y, self.norm)
        constant = self._constant(weight, shift, groups)
        per_input = _reached(scale, shift).unflatten(0, (groups, 1, -1))[..., None, None]
        scaled = (weight.unflatten(0, (groups, -1)) * per_input).flatten(0, 1)
        return convolve(self.block, y, scaled, constant, groups)

    def _above_border(self, x: Tensor, borders: list[Tensor]) -> Tensor:
        """norm(pointwise(x)) less the value of its border [Cm], which is appended to `borders`."""
        y = self.pointwise(x)
        scale, shift = norm_scale_shift(y, self.norm)
        if self.border == "exact" or self.block.padding_mode != "zeros":
            borders.append(shift)
            return (y * _reached(scale, shift)[:, None, None]).to(y.dtype)
        border = self._released_border(scale.dtype)
        borders.append(border)
        return (y * scale[:, None, None] + (shift - border)[:, None, None]).to(y.dtype)

    def _released_border(self, dtype: torch.dtype) -> Tensor:
        """As the released code: norm(0) by the running statistics after this batch, without gradient."""
        tape = current_tape()
        if tape is not None and tape.replaying:
            return tape.next()
        border = _norm_of_zero(self.norm).to(dtype)
        if tape is not None:
            tape.note(border)
        return border


def _reached(scale: Tensor, shift: Tensor) -> Tensor:
    """The scale, through which the norm's bias gets its gradient of zero where nothing else depends on the shift."""
    return scale + 0 * shift


def _can_remake(x: Tensor) -> bool:
    compiled = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not compiled and not torch._C._are_functorch_transforms_active() and Recompute.possible(x)


@torch.no_grad()
def _norm_of_zero(norm: nn.Module) -> Tensor:
    weight, bias, mean, var, eps = affine_norm(norm)
    if mean is None or var is None:
        raise ValueError("border='released' needs inner norms with running statistics; use border='exact'")
    scale = torch.rsqrt(var + eps)
    value = -mean * (scale if weight is None else scale * weight)
    return value if bias is None else value + bias
