"""Inputs of the direct_conv2d ops for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repkern.ops._sample import Sample
from repkern.ops.direct_conv2d import reference
from repkern.ops.direct_conv2d.contract import ACTIVATIONS, METHODS, output_size

__all__ = ["conv_bounds", "samples"]

# The activations' own roundings, and their largest slope.
_ACTIVATION_ROUNDINGS = 8
_SLOPE = 1.5
# What method "split" leaves out (middle x low, low x middle, low x low), in units of the last place.
_LEFT_OUT = 1


class _Case(NamedTuple):
    n: int
    c: int
    k: int
    h: int
    w: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = "relu"
    bias: bool = True
    residual: bool = False
    channels_last: bool = False
    slow: bool = False

    def __str__(self) -> str:
        marks = [self.activation] + [name for name in ("bias", "residual", "channels_last") if getattr(self, name)]
        options = "_".join(
            letter + "x".join(map(str, pair))
            for letter, pair in zip("rspd", (self.kernel, self.stride, self.padding, self.dilation), strict=True)
        )
        return "_".join([f"{self.n}x{self.c}x{self.h}x{self.w}_k{self.k}_{options}_g{self.groups}", *marks])


# Sizes: one, primes, one output; channels: one, a vector, one off it; kernels, strides and paddings unlike each other.
_CASES = (
    _Case(1, 1, 1, 1, 1),
    _Case(2, 3, 5, 7, 9, kernel=(3, 1), stride=(2, 1), padding=(1, 0), residual=True),
    _Case(1, 3, 17, 11, 13, stride=(2, 2), channels_last=True),
    _Case(2, 5, 6, 6, 5, kernel=(1, 1), padding=(0, 0), activation="silu", residual=True),
    _Case(1, 17, 16, 9, 8, kernel=(1, 1), stride=(2, 2), padding=(0, 0), channels_last=True, activation="none"),
    _Case(1, 6, 9, 12, 11, kernel=(5, 3), stride=(3, 2), padding=(2, 0), groups=3, activation="relu6"),
    _Case(1, 7, 7, 9, 10, kernel=(3, 3), padding=(2, 2), dilation=(2, 2), groups=7, bias=False, channels_last=True),
    _Case(1, 16, 33, 10, 9, kernel=(2, 4), padding=(3, 1), dilation=(3, 1), activation="hardswish", channels_last=True),
    _Case(3, 20, 18, 5, 20, kernel=(1, 7), stride=(1, 3), padding=(0, 3), groups=2, residual=True, channels_last=True),
    _Case(1, 8, 24, 4, 4, kernel=(7, 7), stride=(2, 2), padding=(3, 3), groups=8),
    _Case(1, 2, 3, 3, 3, kernel=(2, 2), stride=(4, 5), padding=(4, 4), activation="none", bias=False),
)
_SLOW = (
    _Case(1, 48, 96, 29, 31, stride=(2, 2), channels_last=True, slow=True),
    _Case(2, 64, 80, 19, 23, residual=True, slow=True),
    _Case(5, 96, 40, 7, 7, channels_last=True, activation="silu", slow=True),
    _Case(1, 33, 64, 20, 20, dilation=(2, 2), padding=(2, 2), channels_last=True, slow=True),
)


def samples(op_name: str) -> list[Sample]:
    """Samples for `direct_conv2d_packed` or `direct_pack_weight`."""
    generator = torch.Generator().manual_seed(53)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    make = _conv if op_name == "direct_conv2d_packed" else _weight
    return [make(case, random) for case in _CASES + _SLOW]


def _weight(case: _Case, random: Callable[..., Tensor]) -> Sample:
    args = (random(case.k, case.c // case.groups, *case.kernel), case.groups, METHODS.index("fma"))
    return Sample(str(case), args, (), slow=case.slow, bounds=_exact)


def _exact(args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros_like(reference.direct_pack_weight(*args))]


def _conv(case: _Case, random: Callable[..., Tensor]) -> Sample:
    def like_map(values: Tensor) -> Tensor:
        return values.contiguous(memory_format=torch.channels_last) if case.channels_last else values

    x = like_map(random(case.n, case.c, case.h, case.w))
    weight = random(case.k, case.c // case.groups, *case.kernel)
    packed = reference.direct_pack_weight(weight, case.groups, METHODS.index("fma"))
    bias = random(case.k) if case.bias else None
    size = output_size(x, case.kernel, case.stride, case.padding, case.dilation)
    residual = like_map(random(case.n, case.k, *size)) if case.residual else None
    pairs = [list(pair) for pair in (case.kernel, case.stride, case.padding, case.dilation)]
    options = (case.k, *pairs, case.groups, ACTIVATIONS.index(case.activation))
    return Sample(str(case), (x, packed, bias, residual, *options), (), slow=case.slow, bounds=conv_bounds)


def conv_bounds(args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """The standard bound gamma_n of a sum of n products, on absolute values, and the roundings behind it.

    Method "split" adds six sums into one, each product exact, and leaves out what is below one unit.
    """
    x, packed, bias, residual, *options, _ = args
    absolute = [tensor if tensor is None else tensor.abs() for tensor in (x, packed, bias, residual)]
    plain: tuple[Any, ...] = (*absolute, *options, ACTIVATIONS.index("none"))
    size = reference.direct_conv2d_packed(*plain)
    kernel, length = options[1], x.shape[1] // options[-1]
    u = torch.finfo(dtype).eps / 2
    roundings = length * kernel[0] * kernel[1] + 2 + _ACTIVATION_ROUNDINGS + _LEFT_OUT
    return [_SLOPE * roundings * u / (1 - roundings * u) * size]
