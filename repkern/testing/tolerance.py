"""Tolerances are computed, never chosen: all literals of the error analysis live here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repkern.ops._library import Op
from repkern.testing.inputs import Sample, as_float, map_tensors

__all__ = ["error_bounds", "unit_roundoff"]

# Roundings an element sees besides its longest sum: the products, the scale, the sum over six branches, the mean.
_EXTRA_ROUNDINGS = 12
# Below this no relative statement holds (denormals): absolute floor in units of the smallest normal number.
_DENORMALS = 16


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number of `dtype`."""
    return torch.finfo(dtype).eps / 2


def error_bounds(op: Op, sample: Sample, dtype: torch.dtype) -> list[Tensor]:
    """Elementwise bounds on |computed - exact| for every output, float64.

    The standard bound of a sum of n products in any order: gamma_n * sum |a||b|, gamma_n = n u / (1 - n u), where
    sum |a||b| is the op itself on absolute values, and n is the longest sum behind the output (`sample.lengths`).
    Inputs count as exact in `dtype`. An output written in a shorter dtype adds one rounding of its own.
    An op of another nature brings its own analysis as `sample.bounds`.
    """
    if sample.bounds is not None:
        return [bound + _DENORMALS * torch.finfo(dtype).tiny for bound in sample.bounds(sample.args, dtype)]
    magnitudes = _as_list(op.implementation("reference")(*map_tensors(sample.args, lambda t: as_float(t.abs()))))
    u = unit_roundoff(dtype)
    bounds: list[Tensor] = []
    for magnitude, length in zip(magnitudes, sample.lengths, strict=True):
        n = length + _EXTRA_ROUNDINGS
        bound = n * u / (1 - n * u) * magnitude.double() + _DENORMALS * torch.finfo(dtype).tiny
        if sample.out_dtype is not None:
            bound = bound + (magnitude.double() + bound) * unit_roundoff(sample.out_dtype)
        bounds.append(bound)
    return bounds


def _as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
