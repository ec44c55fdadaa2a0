"""Inputs for every op: the samples beside the op, and ways to make them awkward."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repkern.ops._library import Op
from repkern.ops._sample import Sample

__all__ = ["Sample", "as_float", "map_tensors", "noncontiguous", "samples_of"]


def samples_of(op: Op) -> list[Sample]:
    """The samples that repkern/ops/<stem>/samples.py gives for this op."""
    module = importlib.import_module(f"repkern.ops.{op.stem}.samples")
    return module.samples(op.name)


def as_float(tensor: Tensor) -> Tensor:
    """float64, whatever floating dtype it had."""
    return tensor.double() if tensor.is_floating_point() else tensor


def map_tensors(args: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` applied to every tensor in nested tuples and lists."""
    if isinstance(args, Tensor):
        return function(args)
    if isinstance(args, list | tuple):
        return type(args)(map_tensors(a, function) for a in args)
    return args


def noncontiguous(tensor: Tensor) -> Tensor:
    """The same values in a strided, offset view of a larger buffer."""
    if tensor.dim() == 0:
        return tensor
    padded = torch.full([n + 2 for n in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = padded[tuple(slice(1, n + 1) for n in tensor.shape)]
    view.copy_(tensor)
    return view
