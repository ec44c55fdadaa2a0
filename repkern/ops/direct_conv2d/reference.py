"""direct_conv2d in plain torch: the meaning, and the two forms of packed weights. See docs/ops/direct_conv2d.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from repkern.ops.direct_conv2d.contract import DEPTH, LANES, METHODS, geometry, is_split, map_format, runs_of
from repkern.ops.winograd_conv2d.reference import activate, pack

__all__ = ["direct_conv2d_packed", "direct_pack_weight", "parts_of", "unpack"]


def direct_pack_weight(weight: Tensor, groups: int, method: int) -> Tensor:
    """[K, C/g, kh, kw] -> what `packed_shape` says; zeros behind the last output and input channel."""
    if METHODS[method] == "fma":
        return pack(weight.flatten(2), groups)
    runs, length = runs_of(weight.shape[1], tuple(weight.shape[2:]))
    rows = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], runs, length)
    starts = _block_starts(length)
    blocks = rows.new_zeros(weight.shape[0], runs, len(starts), DEPTH)
    for number, (start, first, last) in enumerate(starts):
        blocks[:, :, number, first - start : last - start] = rows[:, :, first:last]
    taps_inside = _taps_inside(weight.shape[1], weight.shape[3])
    blocks = blocks.unflatten(2, (taps_inside, -1)).permute(0, 3, 1, 2, 4)
    parts = parts_of(blocks).flatten(1, 3).unflatten(0, (groups, -1))  # [g, K/g, blocks, 32, 3]
    outputs = parts.shape[1]
    padded = functional.pad(parts, (0, 0, 0, 0, 0, 0, 0, -outputs % LANES))
    tiles = padded.unflatten(1, (-1, LANES)).unflatten(4, (-1, 2))  # [g, K/16, 16, blocks, 16, 2, 3]
    return tiles.permute(0, 1, 3, 6, 4, 2, 5).contiguous()


def _taps_inside(inputs_per_group: int, kernel_width: int) -> int:
    """The taps of a row that have blocks of their own: all blocks of 32 channels come once per channel block then."""
    return kernel_width if inputs_per_group % DEPTH == 0 else 1


def _block_starts(length: int) -> list[tuple[int, int, int]]:
    """(start, first, last) of the blocks of a run: a block reads from `start`, its weights are `first` to `last`.

    The last block of a long run ends with it, so that nothing behind the run is ever multiplied, not even by zero.
    """
    blocks = []
    for first in range(0, length, DEPTH):
        last = min(first + DEPTH, length)
        blocks.append((max(last - DEPTH, 0), first, last))
    return blocks


def parts_of(values: Tensor) -> Tensor:
    """float32 -> three bfloat16 [..., 3] whose sum it is, each the rounded rest of those before.

    What rounding to bfloat16 would make infinite has no such parts: infinity, and the last 2^-9 of float32's range.
    """
    high = values.bfloat16()
    rest = values - high.float()
    middle = rest.bfloat16()
    return torch.stack((high, middle, (rest - middle.float()).bfloat16()), -1)


def unpack(packed: Tensor, out_channels: int, inputs_per_group: int, kernel_size: Sequence[int], groups: int) -> Tensor:
    """[K, C/g, kh, kw] of packed weights: the inverse, exact but for what `parts_of` excludes."""
    outputs = out_channels // groups
    if not is_split(packed):
        rows = packed.permute(0, 1, 4, 3, 2).flatten(1, 2)[:, :outputs]
        return rows.reshape(out_channels, inputs_per_group, *kernel_size)
    runs, length = runs_of(inputs_per_group, kernel_size)
    wide = packed.float()
    sums = wide[:, :, :, 0] + wide[:, :, :, 1] + wide[:, :, :, 2]  # [g, K/16, blocks, 16, 16, 2]
    blocks = sums.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :outputs]
    taps_inside = _taps_inside(inputs_per_group, kernel_size[1])
    blocks = blocks.reshape(out_channels, -1, runs, taps_inside, DEPTH).permute(0, 2, 3, 1, 4).flatten(2, 3)
    pieces = [
        blocks[:, :, number, first - start : last - start]
        for number, (start, first, last) in enumerate(_block_starts(length))
    ]
    rows = torch.cat(pieces, 2).reshape(out_channels, *kernel_size, inputs_per_group)
    return rows.permute(0, 3, 1, 2).contiguous()


def direct_conv2d_packed(
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
) -> Tensor:
    """activation(conv2d(x) + bias + residual) [N, K, OH, OW]."""
    weight = unpack(packed, out_channels, x.shape[1] // groups, kernel_size, groups)
    where = geometry(x, kernel_size, stride, padding, dilation)
    y = torch.conv2d(x, weight, bias, where.stride, where.padding, where.dilation, groups)
    if residual is not None:
        y = y + residual
    return activate(y, activation).contiguous(memory_format=map_format(x))
