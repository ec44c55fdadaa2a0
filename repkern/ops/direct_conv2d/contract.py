"""What callers of direct_conv2d must keep, checked before any kernel, and the numbers that C++ and Python share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops.winograd_conv2d.contract import ACTIVATIONS, LANES, blocks_of, map_format

__all__ = [
    "ACTIVATIONS",
    "DEPTH",
    "LANES",
    "METHODS",
    "OP",
    "PARTS",
    "Geometry",
    "check_conv",
    "check_weight",
    "geometry",
    "is_split",
    "map_format",
    "output_size",
    "packed_shape",
    "runs_of",
]

OP = "direct_conv2d"
# How products are formed, and so how weights lie: the codes of `method`.
METHODS = ("fma", "split")
# Products of a row that one instruction of the tile unit adds up, and the bfloat16 parts of a float32.
DEPTH, PARTS = 32, 3
_FLOATING = (torch.float32, torch.float64)


def runs_of(inputs_per_group: int, kernel_size: Sequence[int]) -> tuple[int, int]:
    """(runs, length): a filter's runs of numbers side by side: its rows, or all of it where those are short."""
    height, width = kernel_size
    row = width * inputs_per_group
    return (height, row) if row >= DEPTH else (1, height * row)


def packed_shape(
    out_channels: int, inputs_per_group: int, kernel_size: Sequence[int], groups: int, split: bool
) -> tuple[int, ...]:
    """fma: [g, ceil(K/g / 16), kh kw, C/g, 16]; split: [g, ceil(K/g / 16), blocks of 32, 3, 16, 16, 2]."""
    blocks = blocks_of(out_channels // groups)
    if not split:
        return groups, blocks, kernel_size[0] * kernel_size[1], inputs_per_group, LANES
    runs, length = runs_of(inputs_per_group, kernel_size)
    return groups, blocks, runs * -(-length // DEPTH), PARTS, DEPTH // 2, LANES, 2


def is_split(packed: Tensor) -> bool:
    """Whether the weights are in three bfloat16 parts."""
    return packed.dtype == torch.bfloat16


_MOST_PADDED = 1 << 28


class Geometry(NamedTuple):
    """Stride, padding and dilation as kernels get them, and the output's size that follows from them."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def geometry(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Geometry:
    """The output's size, and the numbers by which kernels find their inputs, all bounded by the padded map.

    A stride beyond the padded map gives one output, as that by one position past its end does; the dilation of a
    single tap says nothing. ValueError where there is no output.
    """
    size = output_size(x, kernel_size, stride, padding, dilation)
    dilations = [1 if k == 1 else d for k, d in zip(kernel_size, dilation, strict=True)]
    strides = [
        min(stride[i], int(x.shape[2 + i]) + 2 * padding[i] - dilations[i] * (kernel_size[i] - 1)) for i in range(2)
    ]
    return Geometry(size, (strides[0], strides[1]), (padding[0], padding[1]), (dilations[0], dilations[1]))


def _check_padded(x: Tensor, out_channels: int, size: tuple[int, int], padding: Sequence[int]) -> None:
    """ValueError where padding makes an image so large that rows of zeros are all there is to do."""
    n, channels, height, width = x.shape
    padded = (channels, height + 2 * padding[0], width + 2 * padding[1])
    most = max(_MOST_PADDED, 4 * channels * height * width)
    _check.require_fits(OP, f"the values of an image padded by {tuple(padding)}", *padded, most=most)
    _check.require_fits(OP, "the bytes of the padded maps", n, *padded, 8)
    _check.require_fits(OP, "the bytes of the output", n, out_channels, *size, 8)


def output_size(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of the output; ValueError where there is none."""
    height, width = (
        (int(x.shape[2 + i]) + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    if height < 1 or width < 1:
        raise ValueError(
            f"{OP}: a kernel of {tuple(kernel_size)} with dilation {tuple(dilation)} and padding {tuple(padding)} has "
            f"no output; got an input of {tuple(x.shape[2:])}"
        )
    return height, width


def check_weight(weight: Tensor, groups: int, method: int) -> None:
    """ValueError or TypeError unless `weight` is that of a convolution with `groups`."""
    _check.require_tensor(OP, "weight", weight)
    _check.require_same(OP, {"weight": weight}, _FLOATING)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"{OP}: `weight` must be a non-empty [K, C/g, kh, kw], got {tuple(weight.shape)}")
    if not 0 <= method < len(METHODS):
        raise ValueError(f"{OP}: `method` must be a code below {len(METHODS)}, got {method}")
    if METHODS[method] == "split" and weight.dtype != torch.float32:
        raise TypeError(f"{OP}: method 'split' takes float32 weights, got {weight.dtype}; use method 'fma'")
    _check_groups(groups, weight.shape[0])


def _check_groups(groups: int, out_channels: int) -> None:
    if groups < 1 or out_channels < 1 or out_channels % groups:
        raise ValueError(f"{OP}: out_channels (={out_channels}) must be divisible by `groups` (={groups})")


def check_conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> None:
    """ValueError or TypeError for anything a kernel must not see."""
    _check.require_tensor(OP, "x", x)
    _check.require_tensor(OP, "packed", packed)
    if x.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(f"{OP}: `x` must be one of float32, float64, got {x.dtype}; for half precision: torch.conv2d")
    split = is_split(packed) and x.dtype == torch.float32
    if split and packed.layout is not torch.strided:
        raise TypeError(f"{OP}: `packed` must be a dense tensor, got layout {packed.layout}")
    if split and packed.device != x.device:
        raise ValueError(f"{OP}: `packed` is on {packed.device} but `x` is on {x.device}; one device is needed")
    _check.require_same(
        OP, {"x": x, "packed": None if split else packed, "bias": bias, "residual": residual}, _FLOATING
    )
    _check_groups(groups, out_channels)
    for name, pair, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("padding", padding, 0),
    ):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{OP}: `{name}` must be two numbers of at least {least}, got {tuple(pair)}")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{OP}: `x` must be a non-empty [N, C, H, W], got {tuple(x.shape)}")
    if x.shape[1] % groups:
        raise ValueError(f"{OP}: the {x.shape[1]} channels of `x` must be divisible by `groups` (={groups})")
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(f"{OP}: `activation` must be a code below {len(ACTIVATIONS)}, got {activation}")
    shape = packed_shape(out_channels, x.shape[1] // groups, kernel_size, groups, split)
    _check.require_shape(OP, "packed", packed, shape)
    size = output_size(x, kernel_size, stride, padding, dilation)
    _check_padded(x, out_channels, size, padding)
    if bias is not None:
        _check.require_shape(OP, "bias", bias, (out_channels,))
    if residual is not None:
        _check.require_shape(OP, "residual", residual, (x.shape[0], out_channels, *size))
