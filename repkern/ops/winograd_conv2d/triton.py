"""winograd_conv2d on Triton kernels: allocate, deal tiles to chunks and programs, launch. Shapes are checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from repkern.ops import _check
from repkern.ops._triton import (
    TL_DTYPE,
    block_size,
    contraction_size,
    dot_precision,
    launch_options,
    on_device,
    stored_dtype,
)
from repkern.ops.winograd_conv2d import triton_kernels as kernels
from repkern.ops.winograd_conv2d.contract import (
    LANES,
    blocks_of,
    is_transformed,
    map_format,
    output_size,
    packed_shape,
)
from repkern.ops.winograd_conv2d.matrices import matrices
from repkern.ops.winograd_conv2d.reference import unpack_weight

__all__ = ["winograd_conv2d_packed", "winograd_transform_weight"]

# The transformed maps of a chunk, which should stay in the GPU's second cache between the kernels; at least _TILES.
_WORKSPACE_BYTES = 32 << 20
_TILES = 64
# Values of a point that a program of a transform holds, for each tile size: (m + 2)^2 of them are in registers.
_VALUES = {2: 512, 4: 256, 5: 128, 6: 128}
# Longer sums lose accuracy: at 2048 channels F(4 x 4) would be off by 4e-6 instead of 1e-6.
_CHAIN = 128


def winograd_transform_weight(weight: Tensor, tile: int, groups: int) -> Tensor:
    """[g, ceil(K/g / 16), (tile + 2)^2, C/g, 16]."""
    weight = weight.contiguous()
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
    packed = _check.empty(packed_shape(weight.shape[0], inputs, tile, groups), wide, weight.device)
    total, block = groups * blocks_of(outputs) * inputs * LANES, _VALUES[tile]
    with on_device(weight.device):
        kernels.weight_kernel[(triton.cdiv(total, block),)](
            weight, packed, outputs, inputs, total, _flat(matrices(tile).g), tile + 2, block
        )
    return packed


def _flat(matrix: Tensor) -> tuple[float, ...]:
    return tuple(matrix.flatten().tolist())


class _Chunks(NamedTuple):
    """The tiles of a call, `size` at a time, and the sizes of the maps they are cut from."""

    tile: int
    channels_last: bool
    rows: int
    columns: int
    total: int
    size: int

    def block(self, channels: int) -> tuple[int, int]:
        """Tiles and channels of a program of a transform: neighbours in memory first."""
        values = _VALUES[self.tile]
        if self.channels_last:
            side = block_size(channels, 1, 64)
            return block_size(self.size, 1, values // side), side
        side = block_size(self.size, 1, values)
        return side, block_size(channels, 1, values // side)


def _chunks(x: Tensor, out: Tensor, tile: int, stored: torch.dtype, wide: torch.dtype) -> _Chunks:
    rows, columns = (triton.cdiv(n, tile) for n in out.shape[2:])
    total = x.shape[0] * rows * columns
    bytes_of_tile = (tile + 2) ** 2 * (x.shape[1] * stored.itemsize + out.shape[1] * wide.itemsize)
    most = max(_WORKSPACE_BYTES // bytes_of_tile // _TILES, 1) * _TILES
    size = triton.cdiv(triton.cdiv(total, triton.cdiv(total, most)), _TILES) * _TILES
    channels_last = map_format(x) is torch.channels_last
    return _Chunks(tile, channels_last, rows, columns, total, min(size, total))


def winograd_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    tile: int,
    padding: int,
    groups: int,
    activation: int,
) -> Tensor:
    """[N, K, H + 2 padding - 2, W + 2 padding - 2] in the memory format of x.

    Half maps are multiplied in their own dtype and added up in float32.
    """
    if not is_transformed(packed):
        packed = winograd_transform_weight(unpack_weight(packed, out_channels), tile, groups)
    form = map_format(x)
    x, packed = x.contiguous(memory_format=form), packed.contiguous()
    bias = bias if bias is None else bias.contiguous()
    residual = residual if residual is None else residual.contiguous(memory_format=form)
    wide, stored = packed.dtype, stored_dtype(packed.dtype, x.dtype)
    out = _check.empty((x.shape[0], out_channels, *output_size(x, padding)), stored, x.device, form)
    chunks, points = _chunks(x, out, tile, stored, wide), (tile + 2) ** 2
    v = _check.empty((points * chunks.size * x.shape[1],), stored, x.device)
    product = _check.empty((points * chunks.size * out_channels,), wide, x.device)
    own = matrices(tile)
    a, b, precision = _flat(own.a), _flat(own.b), _precision(stored)
    grid = (chunks.rows, chunks.columns)
    with on_device(x.device):
        for first in range(0, chunks.total, chunks.size):
            count = min(chunks.size, chunks.total - first)
            tiles, channels = chunks.block(x.shape[1])
            kernels.input_kernel[(triton.cdiv(count, tiles) * triton.cdiv(x.shape[1], channels),)](
                x, v, first, count, *x.shape[1:], *grid, padding,
                b, tile + 2, TL_DTYPE[wide], precision, chunks.channels_last, tiles, channels,
            )  # fmt: skip
            _multiply(v, packed, product, count, groups, precision, chunks)
            tiles, channels = chunks.block(out_channels)
            kernels.output_kernel[(triton.cdiv(count, tiles) * triton.cdiv(out_channels, channels),)](
                product, bias, residual, out, first, count, *out.shape[1:], *grid,
                a, tile + 2, activation, bias is not None, residual is not None, chunks.channels_last, tiles, channels,
            )  # fmt: skip
    return out.to(x.dtype)


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype in (torch.float16, torch.bfloat16) else dot_precision(dtype)


def _multiply(
    v: Tensor, packed: Tensor, product: Tensor, count: int, groups: int, precision: str, chunks: _Chunks
) -> None:
    points, inputs = packed.shape[2:4]
    outputs = product.numel() // (points * chunks.size * groups)
    on_tensor_cores = v.dtype in (torch.float16, torch.bfloat16) or precision == "tf32"
    high = 16 if v.dtype is torch.float64 else 64
    # Tensor cores get a taller tile and longer steps than what is unrolled into multiply-adds on registers.
    tiles, columns = block_size(chunks.size, 16, 128 if on_tensor_cores else high), block_size(outputs, 16, high)
    programs = triton.cdiv(count, tiles) * triton.cdiv(outputs, columns) * points * groups
    kernels.product_kernel[(programs,)](
        v, packed, product, count, groups, inputs, outputs,
        points, TL_DTYPE[v.dtype], precision, chunks.channels_last, _CHAIN,
        tiles, columns, 32 if on_tensor_cores else contraction_size(precision), **launch_options(tiles, columns),
    )  # fmt: skip
