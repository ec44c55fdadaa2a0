"""Inputs of the winograd_conv2d ops for tests and benchmarks, and how far their results may be off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repkern.ops._sample import Sample
from repkern.ops.winograd_conv2d import reference
from repkern.ops.winograd_conv2d.contract import ACTIVATIONS, is_transformed, output_size
from repkern.ops.winograd_conv2d.matrices import STRIDE2_TILE, matrices, stride2_matrices

__all__ = ["samples"]

# The activations' own roundings, and their largest slope.
_ACTIVATION_ROUNDINGS = 8
_SLOPE = 1.5


class _Case(NamedTuple):
    n: int
    c: int
    k: int
    h: int
    w: int
    tile: int = 4
    padding: int = 1
    groups: int = 1
    activation: str = "relu"
    bias: bool = True
    residual: bool = False
    channels_last: bool = False
    kernels: bool = False  # packed weights are the kernels themselves
    slow: bool = False

    def __str__(self) -> str:
        marks = [self.activation] + [
            name for name in ("bias", "residual", "channels_last", "kernels") if getattr(self, name)
        ]
        sizes = f"{self.n}x{self.c}x{self.h}x{self.w}_k{self.k}_f{self.tile}_p{self.padding}_g{self.groups}"
        return "_".join([sizes, *marks])


# Sizes: one, below a tile, a tile, one more, primes; channels: one, a vector, one off it; every tile and option.
_CASES = (
    _Case(1, 1, 1, 1, 1),
    _Case(2, 3, 5, 7, 9, residual=True),
    _Case(1, 1, 1, 1, 1, tile=6, padding=2),
    _Case(1, 16, 16, 4, 4, activation="none", channels_last=True),
    _Case(2, 5, 17, 5, 3, tile=2, activation="silu", channels_last=True, residual=True),
    _Case(1, 17, 33, 11, 13, tile=6, activation="hardswish", bias=False),
    _Case(3, 8, 15, 4, 5, tile=2, padding=0, activation="relu6"),
    _Case(1, 6, 8, 3, 8, padding=0, groups=2, channels_last=True),
    _Case(1, 6, 6, 6, 7, padding=2, groups=6, activation="none", bias=False),
    _Case(1, 3, 18, 6, 9, tile=5, residual=True),
    _Case(2, 17, 6, 5, 8, tile=5, padding=2, activation="silu", channels_last=True),
    _Case(1, 8, 34, 11, 7, tile=5, groups=2, channels_last=True, kernels=True),
    _Case(2, 34, 36, 9, 2, groups=2, residual=True, activation="relu6"),
    _Case(5, 4, 70, 2, 2, tile=2, residual=True, channels_last=True),
    _Case(1, 33, 31, 17, 16, tile=6, channels_last=True, residual=True),
    _Case(1, 3, 1, 2, 3, kernels=True),
    _Case(2, 34, 36, 5, 6, tile=2, groups=2, channels_last=True, kernels=True, residual=True),
    _Case(1, 18, 70, 7, 9, activation="silu", kernels=True),
    _Case(1, 17, 33, 7, 13, tile=6, padding=2, channels_last=True, kernels=True),
)
_SLOW = (
    _Case(1, 64, 96, 29, 31, slow=True),
    _Case(2, 48, 112, 19, 23, channels_last=True, residual=True, slow=True),
    _Case(1, 192, 64, 7, 7, tile=2, slow=True),
    _Case(9, 20, 20, 14, 15, tile=6, groups=4, channels_last=True, slow=True),
    _Case(1, 197, 152, 14, 13, kernels=True, slow=True),
    _Case(1, 260, 68, 10, 9, tile=2, channels_last=True, kernels=True, slow=True),
    _Case(1, 200, 96, 14, 14, tile=5, channels_last=True, kernels=True, slow=True),
    _Case(3, 32, 70, 14, 16, tile=5, residual=True, slow=True),
    _Case(1, 330, 120, 7, 11, tile=6, groups=2, channels_last=True, kernels=True, slow=True),
)


_STRIDE2 = (
    _Case(1, 1, 1, 1, 1),
    _Case(2, 3, 5, 7, 9, residual=True),
    _Case(1, 16, 16, 8, 8, activation="none", channels_last=True),
    _Case(1, 17, 33, 11, 18, activation="hardswish", bias=False, channels_last=True, residual=True),
    _Case(3, 8, 15, 4, 5, padding=0, activation="relu6"),
    _Case(1, 6, 8, 3, 10, padding=2, groups=2, channels_last=True),
    _Case(2, 34, 36, 5, 6, groups=2, kernels=True, residual=True),
    _Case(1, 17, 70, 15, 10, activation="silu", channels_last=True, kernels=True),
    _Case(1, 96, 70, 28, 30, channels_last=True, slow=True),
    _Case(2, 48, 112, 57, 43, slow=True),
    _Case(1, 260, 68, 14, 13, channels_last=True, kernels=True, slow=True),
    _Case(3, 197, 152, 27, 15, groups=1, padding=0, kernels=True, slow=True),
)


def samples(op_name: str) -> list[Sample]:
    """Samples for an op of this folder."""
    generator = torch.Generator().manual_seed(31)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if op_name == "winograd_conv2d_packed":
        return [_conv(case, random) for case in _CASES + _SLOW]
    if op_name == "winograd_stride2_conv2d_packed":
        return [_conv(case, random, 2) for case in _STRIDE2]
    return [_weight(case, random) for case in _CASES + _SLOW if not case.kernels]


def _weight(case: _Case, random: Callable[..., Tensor]) -> Sample:
    args = (random(case.k, case.c // case.groups, 3, 3), case.tile, case.groups)
    return Sample(str(case), args, (), slow=case.slow, bounds=_weight_bounds)


def _conv(case: _Case, random: Callable[..., Tensor], stride: int = 1) -> Sample:
    def like_map(values: Tensor) -> Tensor:
        return values.contiguous(memory_format=torch.channels_last) if case.channels_last else values

    x = like_map(random(case.n, case.c, case.h, case.w))
    weight = random(case.k, case.c // case.groups, 3, 3)
    if case.kernels:
        packed = reference.pack(weight.flatten(2), case.groups)
    elif stride == 2:
        packed = reference.transform_stride2_weight(weight, case.groups)
    else:
        packed = reference.winograd_transform_weight(weight, case.tile, case.groups)
    bias = random(case.k) if case.bias else None
    residual = like_map(random(case.n, case.k, *output_size(x, case.padding, stride))) if case.residual else None
    options = (case.k, case.tile, case.padding, case.groups, ACTIVATIONS.index(case.activation))
    bounds = _conv_bounds if stride == 1 else _stride2_bounds
    args = (x, packed, bias, residual, *(options if stride == 1 else (case.k, *options[2:])))
    return Sample(str(case), args, (), slow=case.slow, bounds=bounds)


def _weight_bounds(args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """Computed in float64, rounded once: two products of length 3 with three roundings in each entry of G."""
    weight, tile, groups = args
    size = _absolute_weight(weight, tile, groups)
    exact = torch.finfo(torch.float64).eps / 2
    own = 0.0 if dtype == torch.float64 else torch.finfo(torch.float32).eps / 2
    return [(16 * exact + own) * size]


def _absolute_weight(weight: Tensor, tile: int, groups: int) -> Tensor:
    """|G| |w| |G|^T, packed."""
    own = matrices(tile)
    g = own.g.abs()
    transformed = torch.einsum("ai,kcij,bj->kcab", g, weight.abs(), g)
    return reference.pack(transformed.flatten(2), groups)


def _conv_bounds(args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """First order in u: every sum of the algorithm on absolute values, times the roundings on the longest way through.

    A rounding of the transforms and products happens in S, the result is rounded to the maps' dtype once.
    """
    x, packed, bias, residual, out_channels, tile, padding, groups, _ = args
    own, transformed = matrices(tile), is_transformed(packed)
    if not transformed:
        packed = _absolute_weight(reference.unpack_weight(packed, out_channels), tile, groups)
    geometry = (out_channels, padding, groups, 1)
    size = reference.tiled_product(x.abs(), packed.abs(), own.a.abs(), own.b.abs(), *geometry)
    return [_rounded_size(size, bias, residual, dtype, tile + 2, x.shape[1] // groups, transformed)]


def _stride2_bounds(args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """As `_conv_bounds`, with the longest way that through a point of the even inputs."""
    x, packed, bias, residual, out_channels, padding, groups, _ = args
    own, transformed = stride2_matrices(), is_transformed(packed)
    if not transformed:
        g = own.g[: STRIDE2_TILE + 2].abs()
        kernels = reference.unpack_weight(packed, out_channels).abs()
        packed = reference.pack(torch.einsum("ai,kcij,bj->kcab", g, kernels, g).flatten(2), groups)
    positions = reference.stride2_positions(packed.abs())
    geometry = (out_channels, padding, groups, 2)
    size = reference.tiled_product(x.abs(), positions, own.a.abs(), own.b.abs(), *geometry)
    return [_rounded_size(size, bias, residual, dtype, STRIDE2_TILE + 2, x.shape[1] // groups, transformed)]


def _rounded_size(
    size: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    terms: int,
    inputs: int,
    transformed: bool,
) -> Tensor:
    """The bound from sums of absolute values; terms: the most of one pass of a transform."""
    if bias is not None:
        size = size + bias.abs().view(-1, 1, 1)
    if residual is not None:
        size = size + residual.abs()
    u = torch.finfo(dtype).eps / 2
    # Two passes of B and of A (r terms each, and the rounding of their coefficients), the sum over channels, bias, sum.
    roundings = 4 * (terms + 1) + inputs + 2 + _ACTIVATION_ROUNDINGS
    # Two passes of G: three terms and the rounding of their coefficients.
    roundings += 0 if transformed else 2 * 4
    return _SLOPE * roundings * u / (1 - roundings * u) * size
