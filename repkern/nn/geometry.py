"""The geometry arguments of a convolution block: checks, defaults, and nn.Conv2d's attributes."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch

__all__ = ["Geometry", "Pair", "check_count", "check_dtype", "check_geometry", "same_padding"]

Pair = int | tuple[int, int]
# Far beyond any image, and sums and products of two still fit 64 bits.
_LARGEST = 2**31 - 1
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Geometry(NamedTuple):
    """Checked arguments, in nn.Conv2d's form. `padding` is what the user gave, `pad` the pixels (height, width)."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    pad: tuple[int, int]


def _integer(name: str, value: int) -> int:
    try:
        if isinstance(value, bool):  # which operator.index takes for 0 or 1, and torch's convolutions refuse
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def check_count(name: str, value: int) -> int:
    """A number of channels or the like. ValueError or TypeError, naming it, for another."""
    count = _integer(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if count > _LARGEST:
        raise ValueError(f"{name} must be at most {_LARGEST}, got {value}")
    return count


def _pair(name: str, value: Pair, lowest: int) -> tuple[int, int]:
    items = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(items) == 1:
        items = items * 2
    if len(items) != 2:
        raise ValueError(f"{name} must be an integer or a pair, got {value!r}")
    pair = (_integer(name, items[0]), _integer(name, items[1]))
    if min(pair) < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value!r}")
    if max(pair) > _LARGEST:
        raise ValueError(f"{name} must be at most {_LARGEST}, got {value!r}")
    return pair


def _odd_square(kernel_size: Pair) -> tuple[int, int]:
    pair = _pair("kernel_size", kernel_size, 1)
    if pair[0] != pair[1]:
        raise ValueError(f"kernel_size must be square, got {pair}; keep nn.Conv2d for this layer")
    if pair[0] % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd (the 1x1 branches need a centre), got {pair[0]}; "
            f"use {pair[0] - 1} or {pair[0] + 1}, or keep nn.Conv2d for this layer"
        )
    return pair


def _channels(in_channels: int, out_channels: int, groups: int) -> tuple[int, int, int]:
    counts = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
    checked = [check_count(name, value) for name, value in counts.items()]
    for name, value in zip(("in_channels", "out_channels"), checked, strict=False):
        if value % checked[2]:
            raise ValueError(f"{name} (={value}) must be divisible by groups (={checked[2]})")
    return checked[0], checked[1], checked[2]


def same_padding(kernel_size: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    """The padding that keeps the size at stride 1: what an odd kernel sees to either side of its centre."""
    return dilation[0] * (kernel_size[0] // 2), dilation[1] * (kernel_size[1] // 2)


def check_geometry(
    in_channels: int,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: str | Pair | None = None,
    dilation: Pair = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Geometry:
    """Normalize nn.Conv2d's arguments. ValueError or TypeError, naming the value, for what cannot be a block.

    kernel_size: odd, an integer or a square pair. `padding=None` keeps the size at stride 1: dilation * (K // 2).
    """
    ci, co, g = _channels(in_channels, out_channels, groups)
    kernel = _odd_square(kernel_size)
    strides, dilations = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if max(dilations) * (kernel[0] - 1) > _LARGEST:
        raise ValueError(f"dilation * (K - 1) must be at most {_LARGEST}, got dilation={dilation!r} and K={kernel[0]}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
    same = same_padding(kernel, dilations)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}")
        if padding == "same" and strides != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got {strides}")
        pad = same if padding == "same" else (0, 0)
        return Geometry(ci, co, kernel, strides, padding, dilations, g, padding_mode, pad)
    pad = same if padding is None else _pair("padding", padding, 0)
    return Geometry(ci, co, kernel, strides, pad, dilations, g, padding_mode, pad)


def check_dtype(dtype: torch.dtype | None) -> None:
    """TypeError unless parameters can have this dtype."""
    allowed = (None, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if dtype not in allowed:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
