"""winograd_conv2d in plain torch: the meaning. The math is in docs/ops/winograd_conv2d.md."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from repkern.ops.winograd_conv2d.contract import ACTIVATIONS, LANES, blocks_of, is_transformed, map_format
from repkern.ops.winograd_conv2d.matrices import STRIDE2_TILE, Matrices, matrices, stride2_matrices

__all__ = [
    "activate",
    "pack",
    "stride2_positions",
    "tiled_product",
    "transform_stride2_weight",
    "unpack_weight",
    "winograd_conv2d_packed",
    "winograd_stride2_conv2d_packed",
    "winograd_transform_weight",
]

# Channels that are added up in one chain, as in the kernels: some BLAS libraries add up any number, and lose at 2,048
# channels in float32 what the algorithm promises.
_CHAIN = 128


def winograd_transform_weight(weight: Tensor, tile: int, groups: int) -> Tensor:
    """[K, C/g, 3, 3] -> U = G w G^T as [g, ceil(K/g / 16), (tile + 2)^2, C/g, 16], zeros behind the last output."""
    g = matrices(tile).g.to(weight.device)
    transformed = torch.einsum("ai,kcij,bj->kcab", g, weight.double(), g).flatten(2)
    return pack(transformed, groups).to(weight.dtype if weight.dtype == torch.float64 else torch.float32)


def transform_stride2_weight(weight: Tensor, groups: int) -> Tensor:
    """[K, C/g, 3, 3] -> the different entries of U = G w G^T for stride 2, packed as those of stride 1 of tile 4."""
    g = stride2_matrices().g[: STRIDE2_TILE + 2].to(weight.device)
    transformed = torch.einsum("ai,kcij,bj->kcab", g, weight.double(), g).flatten(2)
    return pack(transformed, groups).to(weight.dtype if weight.dtype == torch.float64 else torch.float32)


def stride2_positions(packed: Tensor) -> Tensor:
    """The weights of all (2 m + 1)^2 positions from the (m + 2)^2 different ones."""
    side = torch.arange(2 * STRIDE2_TILE + 1, device=packed.device).clamp(max=STRIDE2_TILE + 1)
    return packed[:, :, (side[:, None] * (STRIDE2_TILE + 2) + side).flatten()]


def pack(transformed: Tensor, groups: int) -> Tensor:
    """[K, C/g, P] -> [g, ceil(K/g / 16), P, C/g, 16], zeros behind the last output of a group."""
    per_group = transformed.unflatten(0, (groups, -1))
    outputs = per_group.shape[1]
    blocks = blocks_of(outputs)
    padded = functional.pad(per_group, (0, 0, 0, 0, 0, blocks * LANES - outputs))
    return padded.unflatten(1, (blocks, LANES)).permute(0, 1, 4, 3, 2).contiguous()


def unpack_weight(packed: Tensor, out_channels: int) -> Tensor:
    """The kernels [K, C/g, 3, 3] of [g, ceil(K/g / 16), 9, C/g, 16]."""
    groups = packed.shape[0]
    per_group = packed.permute(0, 1, 4, 3, 2).flatten(1, 2)[:, : out_channels // groups]
    return per_group.flatten(0, 1).unflatten(-1, (3, 3))


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
    """activation(conv3x3(x) + bias + residual) [N, K, H + 2 padding - 2, W + 2 padding - 2]."""
    if not is_transformed(packed):
        packed = winograd_transform_weight(unpack_weight(packed, out_channels), tile, groups)
    return _finished(x, packed, bias, residual, matrices(tile), (out_channels, padding, groups, 1), activation)


def winograd_stride2_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    padding: int,
    groups: int,
    activation: int,
) -> Tensor:
    """activation(conv3x3(x, stride 2) + bias + residual)."""
    if not is_transformed(packed):
        packed = transform_stride2_weight(unpack_weight(packed, out_channels), groups)
    packed, own = stride2_positions(packed), stride2_matrices()
    return _finished(x, packed, bias, residual, own, (out_channels, padding, groups, 2), activation)


def _finished(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    own: Matrices,
    geometry: tuple[int, int, int, int],
    activation: int,
) -> Tensor:
    """geometry: output channels, padding, groups, stride."""
    a, b = (matrix.to(x.device, packed.dtype) for matrix in (own.a, own.b))
    y = tiled_product(x.to(packed.dtype), packed, a, b, *geometry)
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return activate(y, activation).to(x.dtype, memory_format=map_format(x))


def tiled_product(
    x: Tensor, packed: Tensor, a: Tensor, b: Tensor, out_channels: int, padding: int, groups: int, stride: int
) -> Tensor:
    """The tiles of x through B, times the packed weights, through A, cut to the output's size."""
    (tile, size), step = a.shape, a.shape[0] * stride
    height, width = ((n + 2 * padding - 3) // stride + 1 for n in x.shape[2:])
    below, right = (
        -(-outputs // tile) * step - step + size - n - padding
        for outputs, n in zip((height, width), x.shape[2:], strict=True)
    )
    x = functional.pad(x, (padding, right, padding, below))
    patches = (
        x.unfold(2, size, step).unfold(3, size, step).unflatten(1, (groups, -1))
    )  # [N, g, C/g, rows, columns, r, r]
    v = torch.einsum("ai,ngcyxij,bj->ngcyxab", b, patches, b).flatten(-2)
    u = packed.permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, : out_channels // groups]  # [g, P, K/g, C/g]
    parts = zip(u.split(_CHAIN, 3), v.split(_CHAIN, 2), strict=True)
    product = torch.stack([torch.einsum("gpkc,ngcyxp->ngkyxp", *part) for part in parts]).sum(0)
    product = product.unflatten(-1, (size, size))
    tiles = torch.einsum("ia,ngkyxab,jb->ngkyixj", a, product, a)
    return tiles.flatten(-2).flatten(-3, -2).flatten(1, 2)[:, :, :height, :width]


def activate(y: Tensor, activation: int) -> Tensor:
    """The activation of this code."""
    functions = {
        "relu": functional.relu,
        "relu6": functional.relu6,
        "silu": functional.silu,
        "hardswish": functional.hardswish,
    }
    name = ACTIVATIONS[activation]
    return y if name == "none" else functions[name](y)
