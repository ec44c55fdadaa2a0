"""The Triton kernels of winograd_conv2d. Math: docs/ops/winograd_conv2d.md; the host side is triton.py.

Tiles of m x m outputs are counted over [N, rows, columns]; a launch has `count` of them from `first` on. Transformed
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
def _from_both_sides(MATRIX: tl.constexpr, values: tl.tuple, ROWS: tl.constexpr, N: tl.constexpr) -> tl.tuple:
    """MATRIX X MATRIX^T for MATRIX [ROWS, N] and X = values [N, N], all flat, row by row."""
    half: tl.tuple = ()
    for row in tl.static_range(ROWS):
        for column in tl.static_range(N):
            total = tl.full(values[0].shape, 0, values[0].dtype)
            for i in tl.static_range(N):
                if MATRIX[row * N + i] != 0:
                    total += MATRIX[row * N + i] * values[i * N + column]
            half += (total,)
    product: tl.tuple = ()
    for row in tl.static_range(ROWS):
        for column in tl.static_range(ROWS):
            total = tl.full(values[0].shape, 0, values[0].dtype)
            for i in tl.static_range(N):
                if MATRIX[column * N + i] != 0:
                    total += MATRIX[column * N + i] * half[row * N + i]
            product += (total,)
    return product


@triton.jit
def _rounded(value: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """To what PRECISION multiplies: tensor cores cut float32 off to TF32, twice the error of the nearest."""
    if PRECISION == "tf32":
        bits = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)  # NaN could become 0
    return value


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
    w: tl.tuple = ()
    for q in tl.static_range(9):
        w += (tl.load(at + q, mask=inside, other=0).to(tl.float64),)
    u = _from_both_sides(G, w, R, 3)
    to = packed + block * (R * R) * inputs * LANES + entry % (LANES * inputs)
    for p in tl.static_range(R * R):
        tl.store(to + p * inputs * LANES, u[p].to(packed.dtype.element_ty), mask=entry < total)


@triton.jit
def input_kernel(
    x: tl.tensor, v: tl.tensor, first: tl.tensor, count: tl.tensor, channels: tl.tensor,
    height: tl.tensor, width: tl.tensor, rows: tl.tensor, columns: tl.tensor, padding: tl.tensor,
    B: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
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
    # Of the first value of a patch, perhaps outside of x.
    if CHANNELS_LAST:
        x += (((n * height + top) * width + left) * channels)[:, None] + c[None, :]
    else:
        x += ((n * channels * height + top) * width + left)[:, None] + (c.to(tl.int64) * height * width)[None, :]
    d: tl.tuple = ()
    for i in tl.static_range(R):
        in_row = inside & ((top + i >= 0) & (top + i < height))[:, None]
        for j in tl.static_range(R):
            in_x = in_row & ((left + j >= 0) & (left + j < width))[:, None]
            at = (i * width + j) * (channels if CHANNELS_LAST else 1)
            d += (tl.load(x + at, mask=in_x, other=0).to(WIDE),)
    result = _from_both_sides(B, d, R, R)
    if CHANNELS_LAST:
        v += t.to(tl.int64)[:, None] * channels + c[None, :]
    else:
        v += c.to(tl.int64)[None, :] * count + t[:, None]
    for p in tl.static_range(R * R):
        value = _rounded(result[p], PRECISION).to(v.dtype.element_ty)
        tl.store(v + p * (tl.cast(channels, tl.int64) * count), value, mask=inside)


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
    p_g = (tl.program_id(0) // (programs_t * programs_k)).to(tl.int64)
    p = p_g % P
    g = p_g // P
    block = g * tl.cdiv(outputs, LANES) + k // LANES
    u = packed + ((block * P + p) * inputs * LANES + k % LANES)[None, :]
    if CHANNELS_LAST:
        v += (p * count + t)[:, None] * (groups * inputs) + g * inputs
        to = product + (p * count + t)[:, None] * (groups * outputs) + (g * outputs + k)[None, :]
    else:
        v += (p * groups + g) * inputs * count + t[:, None]
        to = product + ((p * groups + g) * outputs + k)[None, :] * count + t[:, None]
    total = tl.full((TILES, OUTPUTS), 0, product.dtype.element_ty)
    for chain in range(0, loop_bound(inputs), CHAIN):
        part = tl.full((TILES, OUTPUTS), 0, product.dtype.element_ty)
        for start in range(chain, loop_bound(tl.minimum(chain + CHAIN, inputs)), STEP):
            c = start + tl.arange(0, STEP)
            from_v = c[None, :] if CHANNELS_LAST else c.to(tl.int64)[None, :] * count
            in_v = (t < count)[:, None] & (c < inputs)[None, :]
            in_u = (c < inputs)[:, None] & (k < outputs)[None, :]
            left = tl.load(v + from_v, mask=in_v, other=0)
            right = tl.load(u + c[:, None] * LANES, mask=in_u, other=0).to(DTYPE)
            part = tile_product(left, _rounded(right, PRECISION), part, PRECISION)
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
        product += t.to(tl.int64)[:, None] * channels + k[None, :]
    else:
        product += k.to(tl.int64)[None, :] * count + t[:, None]
    values: tl.tuple = ()
    for p in tl.static_range(R * R):
        values += (tl.load(product + p * (tl.cast(channels, tl.int64) * count), mask=inside, other=0),)
    results = _from_both_sides(A, values, M, R)
    tile = first + t
    n = (tile // (rows * columns)).to(tl.int64)
    top = tile // columns % rows * M
    left = tile % columns * M
    if CHANNELS_LAST:
        corner = (((n * height + top) * width + left) * channels)[:, None] + k[None, :]
    else:
        corner = ((n * channels * height + top) * width + left)[:, None] + (k.to(tl.int64) * height * width)[None, :]
    for i in tl.static_range(M):
        for j in tl.static_range(M):
            in_out = inside & ((top + i < height) & (left + j < width))[:, None]
            at = corner + (i * width + j) * (channels if CHANNELS_LAST else 1)
            result = results[i * M + j]
            if HAS_BIAS:
                result += tl.load(bias + k, mask=in_k, other=0)[None, :]
            if HAS_RESIDUAL:
                result += tl.load(residual + at, mask=in_out, other=0).to(result.dtype)
            tl.store(out + at, _activate(result, ACTIVATION).to(out.dtype.element_ty), mask=in_out)
