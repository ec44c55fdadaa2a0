"""What callers of winograd_conv2d must keep, checked before any kernel, and the numbers that C++ and Python share."""

from __future__ import annotations

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops.winograd_conv2d.matrices import STRIDE2_TILE, TILES

__all__ = [
    "ACTIVATIONS",
    "LANES",
    "OP",
    "blocks_of",
    "check_conv",
    "check_stride2_conv",
    "check_weight",
    "is_transformed",
    "kernels_shape",
    "map_format",
    "output_size",
    "packed_shape",
]

OP = "winograd_conv2d"
ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish")
# Output channels that lie next to each other in packed weights: one AVX-512 vector.
LANES = 16
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def blocks_of(outputs_per_group: int) -> int:
    """How many blocks of LANES hold the output channels of a group."""
    return -(-outputs_per_group // LANES)


def packed_shape(out_channels: int, inputs_per_group: int, tile: int, groups: int) -> tuple[int, ...]:
    """[g, ceil(K/g / 16), (tile + 2)^2, C/g, 16]."""
    return groups, blocks_of(out_channels // groups), (tile + 2) ** 2, inputs_per_group, LANES


def kernels_shape(out_channels: int, inputs_per_group: int, groups: int) -> tuple[int, ...]:
    """[g, ceil(K/g / 16), 9, C/g, 16]."""
    return groups, blocks_of(out_channels // groups), 9, inputs_per_group, LANES


def is_transformed(packed: Tensor) -> bool:
    """Whether packed weights are transformed filters, or else the kernels themselves."""
    return packed.shape[2] != 9


def map_format(x: Tensor) -> torch.memory_format:
    """The memory format of the result: channels_last for an x that is that and not contiguous too."""
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


def output_size(x: Tensor, padding: int, stride: int = 1) -> tuple[int, int]:
    """Height and width of the output; ValueError where there is none."""
    height, width = ((int(n) + 2 * padding - 3) // stride + 1 for n in x.shape[2:])
    if height < 1 or width < 1:
        raise ValueError(f"{OP}: a 3x3 kernel with padding {padding} has no output on an input of {tuple(x.shape[2:])}")
    return height, width


def _check_options(tile: int, groups: int, out_channels: int) -> None:
    if tile not in TILES:
        raise ValueError(f"{OP}: `tile` must be one of {', '.join(map(str, TILES))}, got {tile}")
    if groups < 1 or out_channels < 1 or out_channels % groups:
        raise ValueError(f"{OP}: out_channels (={out_channels}) must be divisible by `groups` (={groups})")


def check_weight(weight: Tensor, tile: int, groups: int) -> None:
    """ValueError or TypeError unless `weight` is that of a 3x3 convolution with `groups`."""
    _check.require_tensor(OP, "weight", weight)
    _check.require_same(OP, {"weight": weight}, _FLOATING)
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3) or 0 in weight.shape:
        raise ValueError(
            f"{OP}: `weight` must be a non-empty [K, C/g, 3, 3], got {tuple(weight.shape)}; other kernels: torch.conv2d"
        )
    _check_options(tile, groups, weight.shape[0])


def check_conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    tile: int,
    padding: int,
    groups: int,
    activation: int,
    stride: int = 1,
) -> None:
    """ValueError or TypeError for anything a kernel must not see."""
    _check.require_tensor(OP, "x", x)
    _check.require_tensor(OP, "packed", packed)
    _check.require_same(OP, {"x": x, "residual": residual}, _FLOATING)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    for name, tensor in (("packed", packed), ("bias", bias)):
        if tensor is None:
            continue
        _check.require_same(OP, {name: tensor}, _FLOATING)
        if tensor.dtype != wide:
            raise TypeError(f"{OP}: `{name}` is {tensor.dtype} but `x` of {x.dtype} needs {wide}; one dtype for all")
        if tensor.device != x.device:
            raise ValueError(f"{OP}: `{name}` is on {tensor.device} but `x` is on {x.device}; one device is needed")
    _check_options(tile, groups, out_channels)
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{OP}: `x` must be a non-empty [N, C, H, W], got {tuple(x.shape)}")
    if x.shape[1] % groups:
        raise ValueError(f"{OP}: the {x.shape[1]} channels of `x` must be divisible by `groups` (={groups})")
    if padding not in (0, 1, 2):
        raise ValueError(f"{OP}: `padding` must be 0, 1 or 2, got {padding}; other paddings: torch.conv2d")
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(f"{OP}: `activation` must be a code below {len(ACTIVATIONS)}, got {activation}")
    inputs = x.shape[1] // groups
    if packed.shape != kernels_shape(out_channels, inputs, groups):
        _check.require_shape(OP, "packed", packed, packed_shape(out_channels, inputs, tile, groups))
    size = output_size(x, padding, stride)
    # A call's workspace holds (tile + 2)^2 points of a tile for every channel, at most 16 an input.
    _check.require_fits(OP, "the bytes of the transformed maps", *x.shape, 16, 8)
    _check.require_fits(OP, "the bytes of the transformed output", x.shape[0], out_channels, *size, 16, 8)
    if bias is not None:
        _check.require_shape(OP, "bias", bias, (out_channels,))
    if residual is not None:
        _check.require_shape(OP, "residual", residual, (x.shape[0], out_channels, *size))


def check_stride2_conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    padding: int,
    groups: int,
    activation: int,
) -> None:
    """As `check_conv`, for stride 2."""
    check_conv(x, packed, bias, residual, out_channels, STRIDE2_TILE, padding, groups, activation, 2)
