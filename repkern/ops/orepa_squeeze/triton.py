"""orepa_squeeze on Triton kernels: allocate, plan the tiles, launch. Shapes were checked before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from repkern.ops import _check
from repkern.ops._triton import TL_DTYPE, argument_table, block_size, dot_precision, on_device
from repkern.ops.orepa_squeeze import triton_kernels as kernels
from repkern.ops.orepa_squeeze.layers import GRADIENT_FIELDS, SqueezeBranches, kernel_shape, unpack

__all__ = ["orepa_squeeze_many", "orepa_squeeze_many_backward"]

_SCALES = ("scale", "scale_avg", "scale_prior", "scale_expand", "scale_pointwise", "scale_project")
_SUM_BLOCK = 256
# Programs a layer's d_reduce should give a GPU; below it the rows are split and the parts summed afterwards.
_WANTED_PROGRAMS = 128
_SPLIT_LEAST_STEPS = 4


class _Tiles(NamedTuple):
    """Tile extents; layers with the same ones share a launch."""

    rows: int  # (o in group, tap)
    inputs: int
    internal: int
    contraction: int
    rest_outputs: int
    rest_inputs: int


def _tiles_of(layer: SqueezeBranches) -> _Tiles:
    co, cig, k, _ = kernel_shape(layer)
    double = layer.dtype is torch.float64
    top = 16 if double else 64
    internal = 1 if layer.reduce is None else layer.reduce.shape[0] // layer.groups
    return _Tiles(
        rows=block_size(co // layer.groups * k * k, 16, top),
        inputs=block_size(cig, 16, top),
        internal=block_size(internal, 16, top),
        contraction=16 if double else 32,
        rest_outputs=block_size(co // layer.groups, 1, 16),
        rest_inputs=block_size(cig, 1, 64),
    )
