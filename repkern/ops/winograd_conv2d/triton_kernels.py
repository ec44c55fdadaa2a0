"""The Triton kernels of winograd_conv2d. Math: docs/ops/winograd_conv2d.md; the host side is triton.py.

Tiles of m x m outputs are counted over [N, rows, columns]; a launch has `count` of them from `first` on. The transformed
maps are [P, count, channels] in the channels_last layout, [P, channels, count] otherwise, P = (m + 2)^2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from repkern.ops._triton import loop_bound, tile_product
from repkern.ops.winograd_conv2d import contract

__all__ = ["input_kernel", "output_kernel", "product_kernel", "weight_kernel"]

LANES = tl.constexpr(contract.LANES)
RELU, RELU6, SILU, HARDSWISH = (
    tl.constexpr(contract.ACTIVATIONS.index(name)) for name in ("relu", "relu6", "silu", "hardswish")
)


@triton.jit
def _row_times(
    MATRIX: tl.constexpr, ROW: tl.constexpr, values: tl.tuple, START: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    """The sum over i < N of MATRIX[ROW, i] values[START + i STEP]; MATRIX is flat, row by row."""
    total = tl.zeros_like(values[START])
    for i in tl.static_range(N):
        if MATRIX[ROW * N + i] != 0:
            total += MATRIX[ROW * N + i] * values[START + i * STEP]
    return total


@triton.jit
def _columns_times(MATRIX: tl.constexpr, values: tl.tuple, ROWS: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """MATRIX [ROWS, N] times the matrix `values` [N, WIDTH], both flat."""
    product = ()
    for row in tl.static_range(ROWS):
        for column in tl.static_range(WIDTH):
            product = product + (_row_times(MATRIX, row, values, column, WIDTH, N),)
    return product


@triton.jit
def _activate(z: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """NaN stays: tl.maximum would drop it."""
    if ACTIVATION == RELU:
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == RELU6:
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == SILU:
        z = z / (1 + tl.exp(-z))
    elif ACTIVATION == HARDSWISH:
        z = tl.where(z <= -3, 0.0, tl.where(z >= 3, z, z * (z + 3) / 6))
    return z


@triton.jit
def weight_kernel(
    weight: tl.tensor, packed: tl.tensor, outputs: tl.tensor, inputs: tl.tensor, total: tl.tensor,
    G: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """packed [g, blocks, P, C/g, 16] = G w G^T in float64, rounded once; weight [g, outputs, inputs, 3, 3].

    total: the entries of one point, [g, blocks, C/g, 16].
    """
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    blocks = tl.cdiv(outputs, LANES)
    c = entry // LANES % inputs
    block = entry // (LANES * inputs)
    k = block % blocks * LANES + entry % LANES
    inside = (entry < total) & (k < outputs)
    at = weight + ((block // blocks * outputs + k) * inputs + c) * 9
    w = ()
    for q in tl.static_range(9):
        w = w + (tl.load(at + q, mask=inside, other=0).to(tl.float64),)
    half = _columns_times(G, w, R, 3, 3)
    to = packed + block * (R * R) * inputs * LANES + entry % (LANES * inputs)
    for a in tl.static_range(R):
        for b in tl.static_range(R):
            u = _row_times(G, b, half, a * 3, 1, 3).to(packed.dtype.element_ty)
            tl.store(to + (a * R + b) * inputs * LANES, u, mask=entry < total)


@triton.jit
def input_kernel(
    x: tl.tensor, v: tl.tensor, first: tl.tensor, count: tl.tensor, channels: tl.tensor,
    height: tl.tensor, width: tl.tensor, rows: tl.tensor, columns: tl.tensor, padding: tl.tensor,
    B: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    TILES: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """v = B d B^T of every patch d of x [N, C, H, W], zero outside of x."""
    programs_t = tl.cdiv(count, TILES)
    t = tl.program_id(0) % programs_t * TILES + tl.arange(0, TILES)
    c = tl.program_id(0) // programs_t * CHANNELS + tl.arange(0, CHANNELS)
    tile = first + t
    n = (tile // (rows * columns)).to(tl.int64)
    top = tile // columns % rows * (R - 2) - padding
    left = tile % columns * (R - 2) - padding
    inside = (t < count)[:, None] & (c < channels)[None, :]
    d = ()
    for i in tl.static_range(R):
        for j in tl.static_range(R):
            y = top + i
            z = left + j
            in_x = (y >= 0) & (y < height) & (z >= 0) & (z < width)
            if CHANNELS_LAST:
                at = (((n * height + y) * width + z) * channels)[:, None] + c[None, :]
            else:
                at = (n * channels * height * width + y * width + z)[:, None]
                at = at + (c.to(tl.int64) * height * width)[None, :]
            d = d + (tl.load(x + at, mask=inside & in_x[:, None], other=0).to(WIDE),)
    half = _columns_times(B, d, R, R, R)
    if CHANNELS_LAST:
        to = v + t.to(tl.int64)[:, None] * channels + c[None, :]
    else:
        to = v + c.to(tl.int64)[None, :] * count + t[:, None]
    for a in tl.static_range(R):
        for b in tl.static_range(R):
            result = _row_times(B, b, half, a * R, 1, R).to(v.dtype.element_ty)
            tl.store(to, result, mask=inside)
            to += channels.to(tl.int64) * count


@triton.jit
def product_kernel(
    v: tl.tensor, packed: tl.tensor, product: tl.tensor,
    count: tl.tensor, groups: tl.tensor, inputs: tl.tensor, outputs: tl.tensor,
    P: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, CHAIN: tl.constexpr,
    TILES: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """product[p, t, k] = sum over c of v[p, t, c] u[p, c, k] in a group; sums are cut after each CHAIN channels.

    inputs, outputs: channels per group. A program has one point and group and a tile [TILES, OUTPUTS].
    """
    programs_t = tl.cdiv(count, TILES)
    programs_k = tl.cdiv(outputs, OUTPUTS)
    t = tl.program_id(0) % programs_t * TILES + tl.arange(0, TILES)
    k = tl.program_id(0) // programs_t % programs_k * OUTPUTS + tl.arange(0, OUTPUTS)
    p = (tl.program_id(0) // (programs_t * programs_k) % P).to(tl.int64)
    g = (tl.program_id(0) // (programs_t * programs_k) // P).to(tl.int64)
    block = g * tl.cdiv(outputs, LANES) + k // LANES
    u = packed + ((block * P + p) * inputs * LANES + k % LANES)[None, :]
    if CHANNELS_LAST:
        v += (p * count + t)[:, None] * (groups * inputs) + g * inputs
        to = product + (p * count + t)[:, None] * (groups * outputs) + (g * outputs + k)[None, :]
    else:
        v += (p * groups + g) * inputs * count + t[:, None]
        to = product + ((p * groups + g) * outputs + k)[None, :] * count + t[:, None]
    total = tl.zeros((TILES, OUTPUTS), product.dtype.element_ty)
    for chain in range(0, loop_bound(inputs), CHAIN):
        part = tl.zeros((TILES, OUTPUTS), product.dtype.element_ty)
        for start in range(chain, loop_bound(tl.minimum(chain + CHAIN, inputs)), STEP):
            c = start + tl.arange(0, STEP)
            from_v = (c[None, :] if CHANNELS_LAST else c.to(tl.int64)[None, :] * count)
            in_v = (t < count)[:, None] & (c < inputs)[None, :]
            in_u = (c < inputs)[:, None] & (k < outputs)[None, :]
            left = tl.load(v + from_v, mask=in_v, other=0)
            right = tl.load(u + c[:, None] * LANES, mask=in_u, other=0).to(DTYPE)
            part = tile_product(left, right, part, PRECISION)
        total += part
    tl.store(to, total, mask=(t < count)[:, None] & (k < outputs)[None, :])


@triton.jit
def output_kernel(
    product: tl.tensor, bias: tl.tensor, residual: tl.tensor, out: tl.tensor,
    first: tl.tensor, count: tl.tensor, channels: tl.tensor,
    height: tl.tensor, width: tl.tensor, rows: tl.tensor, columns: tl.tensor,
    A: tl.constexpr, R: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """out [N, K, height, width] = activation(A product A^T + bias + residual)."""
    M: tl.constexpr = R - 2
    programs_t = tl.cdiv(count, TILES)
    t = tl.program_id(0) % programs_t * TILES + tl.arange(0, TILES)
    k = tl.program_id(0) // programs_t * CHANNELS + tl.arange(0, CHANNELS)
    in_k = k < channels
    inside = (t < count)[:, None] & in_k[None, :]
    if CHANNELS_LAST:
        source = product + t.to(tl.int64)[:, None] * channels + k[None, :]
    else:
        source = product + k.to(tl.int64)[None, :] * count + t[:, None]
    values = ()
    for _ in tl.static_range(R * R):
        values = values + (tl.load(source, mask=inside, other=0),)
        source += channels.to(tl.int64) * count
    half = _columns_times(A, values, M, R, R)
    tile = first + t
    n = (tile // (rows * columns)).to(tl.int64)
    for i in tl.static_range(M):
        for j in tl.static_range(M):
            y = tile // columns % rows * M + i
            z = tile % columns * M + j
            in_out = inside & ((y < height) & (z < width))[:, None]
            if CHANNELS_LAST:
                at = (((n * height + y) * width + z) * channels)[:, None] + k[None, :]
            else:
                at = (n * channels * height * width + y * width + z)[:, None]
                at = at + (k.to(tl.int64) * height * width)[None, :]
            result = _row_times(A, j, half, i * R, 1, R)
            if HAS_BIAS:
                result += tl.load(bias + k, mask=in_k, other=0)[None, :]
            if HAS_RESIDUAL:
                result += tl.load(residual + at, mask=in_out, other=0).to(result.dtype)
            tl.store(out + at, _activate(result, ACTIVATION).to(out.dtype.element_ty), mask=in_out)
