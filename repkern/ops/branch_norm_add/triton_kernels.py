"""The Triton kernels of branch_norm_add. Math: docs/ops/branch_norm_add.md; the host side is triton.py.

`table` [B, COLUMNS] int64 holds what a branch has: addresses (0: none), its mode, its row among the norms, the bits of
its eps. Maps are read in tiles [POS, CH]: q counts the positions (n, p) of a channel, c the channels. `coefficients`
[3, B, C]: scale, mean and 1 / deviation; a map added as it is has scale 1 and mean 0. Capitals are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from repkern.ops._triton import loop_bound

__all__ = [
    "COLUMNS",
    "coefficients_kernel",
    "gradients_kernel",
    "merge_moments_kernel",
    "merge_sums_kernel",
    "moments_kernel",
    "slopes_kernel",
    "statistics_backward_kernel",
    "sum_kernel",
    "sums_kernel",
]

# fmt: off
COLUMNS = ("mode", "slot", "y", "weight", "bias", "mean", "var", "eps", "grad")
WIDTH = tl.constexpr(len(COLUMNS))
MODE, SLOT, Y, WEIGHT, BIAS, MEAN, VAR, EPS, GRAD = (tl.constexpr(column) for column in range(len(COLUMNS)))
# fmt: on
BATCH = tl.constexpr(0)
AS_IS = tl.constexpr(2)
NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
RELU6 = tl.constexpr(2)
SILU = tl.constexpr(3)
HARDSWISH = tl.constexpr(4)


@triton.jit
def _pointer(row: tl.tensor, COLUMN: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    return tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))


@triton.jit
def _offsets(
    q: tl.tensor, c: tl.tensor, channels: tl.tensor, plane: tl.tensor, CHANNELS_LAST: tl.constexpr
) -> tl.tensor:
    """Where the values [q, c] of a map lie."""
    if CHANNELS_LAST:
        at = q.to(tl.int64)[:, None] * channels + c[None, :]
    else:
        n = (q // plane).to(tl.int64)
        at = (n * channels * plane + q % plane)[:, None] + (c.to(tl.int64) * plane)[None, :]
    return at


@triton.jit
def _sigmoid(z: tl.tensor) -> tl.tensor:
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1, small) / (1 + small)


@triton.jit
def _activate(z: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    if ACTIVATION == RELU:
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == RELU6:
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == SILU:
        z = z * _sigmoid(z)
    elif ACTIVATION == HARDSWISH:
        z = tl.where(z <= -3, 0.0, tl.where(z >= 3, z, z * (z + 3) / 6))
    return z


@triton.jit
def _activate_backward(grad: tl.tensor, z: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    if ACTIVATION == RELU:
        grad = tl.where(z <= 0, 0.0, grad)
    elif ACTIVATION == RELU6:
        grad = tl.where((z <= 0) | (z >= 6), 0.0, grad)
    elif ACTIVATION == SILU:
        gate = _sigmoid(z)
        grad = grad * gate * (1 + z * (1 - gate))
    elif ACTIVATION == HARDSWISH:
        grad = tl.where(z <= -3, 0.0, tl.where(z < 3, grad * (z / 3 + 0.5), grad))
    return grad


@triton.jit
def _sum_of_branches(
    table: tl.tensor,
    coefficients: tl.tensor,
    shift: tl.tensor,
    branches: tl.tensor,
    channels: tl.tensor,
    c: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """z [POS, CH] in the one order of fused multiply-adds that every pass shares."""
    total = tl.load(shift + c, mask=c < channels, other=0)[None, :] + tl.zeros(at.shape, WIDE)
    for b in range(loop_bound(branches)):
        scale = tl.load(coefficients + b * channels + c, mask=c < channels, other=0)
        y = tl.load(_pointer(table + b * WIDTH, Y, DTYPE) + at, mask=inside, other=0).to(WIDE)
        total = tl.fma(y, scale[None, :] + tl.zeros(at.shape, WIDE), total)
    return total


@triton.jit
def _merge(
    n: tl.tensor,
    mean: tl.tensor,
    squares: tl.tensor,
    other_n: tl.tensor,
    other_mean: tl.tensor,
    other_squares: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Counts, means and sums of squared deviations of two parts -> of both (Chan, Golub and LeVeque)."""
    total = n + other_n
    part = other_n / total
    apart = other_mean - mean
    return total, mean + apart * part, squares + other_squares + apart * apart * n * part


@triton.jit
def moments_kernel(
    table: tl.tensor, parts: tl.tensor,
    channels: tl.tensor, plane: tl.tensor, positions: tl.tensor, splits: tl.tensor, per_split: tl.tensor,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, CHANNELS_LAST: tl.constexpr, POS: tl.constexpr, CH: tl.constexpr,
) -> None:  # fmt: skip
    """parts [B0, splits, 3, C]: moments of one map over one split, counted from the channel's first value."""
    tiles_c = tl.cdiv(channels, CH)
    program = tl.program_id(0)
    c = program % tiles_c * CH + tl.arange(0, CH)
    split = program // tiles_c % splits
    b = program // (tiles_c * splits)
    in_c = c < channels
    map_of = _pointer(table + b * WIDTH, Y, DTYPE)
    first = c.to(tl.int64) * (1 if CHANNELS_LAST else plane)
    origin = tl.load(map_of + first, mask=in_c, other=0).to(WIDE)
    n = tl.zeros((CH,), WIDE)
    mean = tl.zeros((CH,), WIDE)
    squares = tl.zeros((CH,), WIDE)
    end = tl.minimum((split + 1) * per_split, positions)
    for start in range(loop_bound(split * per_split), loop_bound(end), POS):
        q = start + tl.arange(0, POS)
        inside = (q < end)[:, None] & in_c[None, :]
        y = tl.load(map_of + _offsets(q, c, channels, plane, CHANNELS_LAST), mask=inside, other=0).to(WIDE)
        y = tl.where(inside, y - origin[None, :], 0.0)
        tile_n = tl.zeros((CH,), WIDE) + tl.minimum(end - start, POS).to(WIDE)
        tile_mean = tl.sum(y, axis=0) / tile_n
        centred = tl.where(inside, y - tile_mean[None, :], 0.0)
        tile_squares = tl.sum(centred * centred, axis=0)
        n, mean, squares = _merge(n, mean, squares, tile_n, tile_mean, tile_squares)
    at = parts + (b * splits + split).to(tl.int64) * 3 * channels + c
    tl.store(at, n, mask=in_c)
    tl.store(at + channels, mean, mask=in_c)
    tl.store(at + 2 * channels, squares, mask=in_c)


@triton.jit
def merge_moments_kernel(
    table: tl.tensor, parts: tl.tensor, splits: tl.tensor, channels: tl.tensor, plane: tl.tensor,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, CHANNELS_LAST: tl.constexpr, CH: tl.constexpr,
) -> None:  # fmt: skip
    """mean and var of every batch-normalized map; table: those only."""
    tiles_c = tl.cdiv(channels, CH)
    b = tl.program_id(0) // tiles_c
    c = tl.program_id(0) % tiles_c * CH + tl.arange(0, CH)
    in_c = c < channels
    row = table + b * WIDTH
    n = tl.zeros((CH,), WIDE)
    mean = tl.zeros((CH,), WIDE)
    squares = tl.zeros((CH,), WIDE)
    for split in range(loop_bound(splits)):
        at = parts + (b * splits + split).to(tl.int64) * 3 * channels + c
        part_n = tl.load(at, mask=in_c, other=1)
        part_mean = tl.load(at + channels, mask=in_c, other=0)
        part_squares = tl.load(at + 2 * channels, mask=in_c, other=0)
        n, mean, squares = _merge(n, mean, squares, part_n, part_mean, part_squares)
    first = c.to(tl.int64) * (1 if CHANNELS_LAST else plane)
    origin = tl.load(_pointer(row, Y, DTYPE) + first, mask=in_c, other=0).to(WIDE)
    tl.store(_pointer(row, MEAN, WIDE) + c, origin + mean, mask=in_c)
    tl.store(_pointer(row, VAR, WIDE) + c, squares / n, mask=in_c)


@triton.jit
def coefficients_kernel(
    table: tl.tensor, coefficients: tl.tensor, shift: tl.tensor, branches: tl.tensor, channels: tl.tensor,
    WIDE: tl.constexpr, PARAM: tl.constexpr, CH: tl.constexpr,
) -> None:  # fmt: skip
    """scale, mean, 1 / deviation and the shift, worked out in float64 as branch_norm_add.h says."""
    c = tl.program_id(0) * CH + tl.arange(0, CH)
    in_c = c < channels
    total = tl.zeros((CH,), tl.float64)
    for b in range(loop_bound(branches)):
        row = table + b * WIDTH
        mode = tl.load(row + MODE)
        scale = tl.full((CH,), 1, WIDE)
        mean = tl.zeros((CH,), WIDE)
        inverse = tl.full((CH,), 1, WIDE)
        if mode != AS_IS:
            if mode == BATCH:
                mean = tl.load(_pointer(row, MEAN, WIDE) + c, mask=in_c, other=0)
                var = tl.load(_pointer(row, VAR, WIDE) + c, mask=in_c, other=1).to(tl.float64)
            else:
                mean = tl.load(_pointer(row, MEAN, PARAM) + c, mask=in_c, other=0).to(WIDE)
                var = tl.load(_pointer(row, VAR, PARAM) + c, mask=in_c, other=1).to(tl.float64)
            exact = 1 / tl.sqrt(var + tl.load(row + EPS).to(tl.float64, bitcast=True))
            inverse = exact.to(WIDE)
            weight = tl.load(_pointer(row, WEIGHT, PARAM) + c, mask=in_c, other=0).to(WIDE).to(tl.float64)
            scale = (weight * exact).to(WIDE)
            bias = tl.load(_pointer(row, BIAS, PARAM) + c, mask=in_c, other=0).to(WIDE).to(tl.float64)
            total += bias - mean.to(tl.float64) * scale.to(tl.float64)
        at = coefficients + b * channels + c
        tl.store(at, scale, mask=in_c)
        tl.store(at + branches * channels, mean, mask=in_c)
        tl.store(at + 2 * branches * channels, inverse, mask=in_c)
    tl.store(shift + c, total.to(WIDE), mask=in_c)


@triton.jit
def sum_kernel(
    table: tl.tensor, coefficients: tl.tensor, shift: tl.tensor, out: tl.tensor,
    branches: tl.tensor, channels: tl.tensor, plane: tl.tensor, positions: tl.tensor,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr,
    POS: tl.constexpr, CH: tl.constexpr,
) -> None:  # fmt: skip
    """out = activation(z), a tile a program."""
    tiles_c = tl.cdiv(channels, CH)
    c = tl.program_id(0) % tiles_c * CH + tl.arange(0, CH)
    q = tl.program_id(0) // tiles_c * POS + tl.arange(0, POS)
    inside = (q < positions)[:, None] & (c < channels)[None, :]
    at = _offsets(q, c, channels, plane, CHANNELS_LAST)
    z = _sum_of_branches(table, coefficients, shift, branches, channels, c, at, inside, DTYPE, WIDE)
    tl.store(out + at, _activate(z, ACTIVATION).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _grad_of_sum(
    table: tl.tensor,
    coefficients: tl.tensor,
    shift: tl.tensor,
    grad: tl.tensor,
    branches: tl.tensor,
    channels: tl.tensor,
    c: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """dz [POS, CH]; 0 outside."""
    dz = tl.load(grad + at, mask=inside, other=0).to(WIDE)
    if ACTIVATION != NONE:
        z = _sum_of_branches(table, coefficients, shift, branches, channels, c, at, inside, DTYPE, WIDE)
        dz = _activate_backward(dz, z, ACTIVATION)
    return dz


@triton.jit
def sums_kernel(
    table: tl.tensor, coefficients: tl.tensor, shift: tl.tensor, grad: tl.tensor, parts: tl.tensor,
    branches: tl.tensor, norms: tl.tensor, channels: tl.tensor, plane: tl.tensor, positions: tl.tensor,
    splits: tl.tensor, per_split: tl.tensor,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, POS: tl.constexpr, CH: tl.constexpr,
) -> None:  # fmt: skip
    """parts [splits, 1 + Bn, C]: the sum of dz and those of dz * xhat over one split; ROWS covers 1 + Bn."""
    tiles_c = tl.cdiv(channels, CH)
    c = tl.program_id(0) % tiles_c * CH + tl.arange(0, CH)
    split = tl.program_id(0) // tiles_c
    in_c = c < channels
    rows = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, CH), WIDE)
    end = tl.minimum((split + 1) * per_split, positions)
    for start in range(loop_bound(split * per_split), loop_bound(end), POS):
        q = start + tl.arange(0, POS)
        inside = (q < end)[:, None] & in_c[None, :]
        at = _offsets(q, c, channels, plane, CHANNELS_LAST)
        dz = _grad_of_sum(
            table, coefficients, shift, grad, branches, channels, c, at, inside, DTYPE, WIDE, ACTIVATION
        )  # fmt: skip
        total += tl.where((rows == 0)[:, None], tl.sum(dz, axis=0)[None, :], 0.0)
        for b in range(loop_bound(branches)):
            row = table + b * WIDTH
            if tl.load(row + MODE) != AS_IS:
                own = coefficients + b * channels + c
                mean = tl.load(own + branches * channels, mask=in_c, other=0)
                inverse = tl.load(own + 2 * branches * channels, mask=in_c, other=0)
                y = tl.load(_pointer(row, Y, DTYPE) + at, mask=inside, other=0).to(WIDE)
                product = tl.where(inside, dz * (y - mean[None, :]), 0.0)
                sums = tl.sum(product, axis=0) * inverse
                total += tl.where((rows == 1 + tl.load(row + SLOT))[:, None], sums[None, :], 0.0)
    to = parts + (split * (1 + norms) + rows).to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(to, total, mask=(rows <= norms)[:, None] & in_c[None, :])


@triton.jit
def merge_sums_kernel(
    parts: tl.tensor, sums: tl.tensor, count: tl.tensor, splits: tl.tensor, WIDE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """sums [count] = the sum of parts [splits, count] over the splits, in their order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), WIDE)
    for split in range(loop_bound(splits)):
        total += tl.load(parts + split * count.to(tl.int64) + i, mask=i < count, other=0)
    tl.store(sums + i, total, mask=i < count)


@triton.jit
def slopes_kernel(
    table: tl.tensor, coefficients: tl.tensor, sums: tl.tensor, count: tl.tensor, slopes: tl.tensor,
    grad_weight: tl.tensor, grad_bias: tl.tensor, branches: tl.tensor, channels: tl.tensor,
    WIDE: tl.constexpr, CH: tl.constexpr,
) -> None:  # fmt: skip
    """slopes [2, B, C]: slope and constant of grad_b = scale dz + slope (y - mean) + constant; parameters' grads."""
    c = tl.program_id(0) * CH + tl.arange(0, CH)
    in_c = c < channels
    all_dz = tl.load(sums + c, mask=in_c, other=0)
    tl.store(grad_bias + c, all_dz.to(grad_bias.dtype.element_ty), mask=in_c)
    total = tl.load(count)
    for b in range(loop_bound(branches)):
        row = table + b * WIDTH
        if tl.load(row + MODE) != AS_IS:
            slot = tl.load(row + SLOT)
            own = tl.load(sums + (1 + slot) * channels + c, mask=in_c, other=0)
            at = grad_weight + slot * channels + c
            tl.store(at, own.to(grad_weight.dtype.element_ty), mask=in_c)
            scale = tl.load(coefficients + b * channels + c, mask=in_c, other=0) / total
            inverse = tl.load(coefficients + (2 * branches + b) * channels + c, mask=in_c, other=0)
            tl.store(slopes + b * channels + c, -scale * inverse * own, mask=in_c)
            tl.store(slopes + (branches + b) * channels + c, -scale * all_dz, mask=in_c)


@triton.jit
def gradients_kernel(
    table: tl.tensor, coefficients: tl.tensor, shift: tl.tensor, slopes: tl.tensor, grad: tl.tensor, as_is: tl.tensor,
    branches: tl.tensor, channels: tl.tensor, plane: tl.tensor, positions: tl.tensor,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, STORED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_AS_IS: tl.constexpr, POS: tl.constexpr, CH: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of every map, a tile of each a program."""
    tiles_c = tl.cdiv(channels, CH)
    c = tl.program_id(0) % tiles_c * CH + tl.arange(0, CH)
    q = tl.program_id(0) // tiles_c * POS + tl.arange(0, POS)
    in_c = c < channels
    inside = (q < positions)[:, None] & in_c[None, :]
    at = _offsets(q, c, channels, plane, CHANNELS_LAST)
    dz = _grad_of_sum(
        table, coefficients, shift, grad, branches, channels, c, at, inside, DTYPE, WIDE, ACTIVATION
    )  # fmt: skip
    if HAS_AS_IS:
        tl.store(as_is + at, dz.to(STORED), mask=inside)
    for b in range(loop_bound(branches)):
        row = table + b * WIDTH
        if tl.load(row + GRAD) != 0:
            own = b * channels + c
            result = dz * tl.load(coefficients + own, mask=in_c, other=0)[None, :]
            if tl.load(row + MODE) == BATCH:
                mean = tl.load(coefficients + branches * channels + own, mask=in_c, other=0)
                slope = tl.load(slopes + own, mask=in_c, other=0)
                constant = tl.load(slopes + branches * channels + own, mask=in_c, other=0)
                y = tl.load(_pointer(row, Y, DTYPE) + at, mask=inside, other=0).to(WIDE)
                result += (y - mean[None, :]) * slope[None, :] + constant[None, :]
            tl.store(_pointer(row, GRAD, STORED) + at, result.to(STORED), mask=inside)


@triton.jit
def statistics_backward_kernel(
    table: tl.tensor, grad_mean: tl.tensor, grad_var: tl.tensor,
    channels: tl.tensor, plane: tl.tensor, positions: tl.tensor,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, STORED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    POS: tl.constexpr, CH: tl.constexpr,
) -> None:  # fmt: skip
    """grad_b = (grad_mean + 2 (y - mean) grad_var) / (N P), a tile of one map a program."""
    tiles_c = tl.cdiv(channels, CH)
    tiles_q = tl.cdiv(positions, POS)
    c = tl.program_id(0) % tiles_c * CH + tl.arange(0, CH)
    q = tl.program_id(0) // tiles_c % tiles_q * POS + tl.arange(0, POS)
    b = tl.program_id(0) // (tiles_c * tiles_q)
    row = table + b * WIDTH
    in_c = c < channels
    inside = (q < positions)[:, None] & in_c[None, :]
    at = _offsets(q, c, channels, plane, CHANNELS_LAST)
    mean = tl.load(_pointer(row, MEAN, WIDE) + c, mask=in_c, other=0)
    constant = tl.load(grad_mean + b * channels + c, mask=in_c, other=0) / positions.to(WIDE)
    slope = 2 * tl.load(grad_var + b * channels + c, mask=in_c, other=0) / positions.to(WIDE)
    y = tl.load(_pointer(row, Y, DTYPE) + at, mask=inside, other=0).to(WIDE)
    result = (y - mean[None, :]) * slope[None, :] + constant[None, :]
    tl.store(_pointer(row, GRAD, STORED) + at, result.to(STORED), mask=inside)
