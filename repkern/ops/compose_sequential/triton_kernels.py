"""The Triton kernel of compose_sequential. Math: docs/ops/compose_sequential.md; the host side is triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from repkern.ops._triton import loop_bound, tile_product

__all__ = ["product_over_positions_kernel"]


@triton.jit
def product_over_positions_kernel(
    a: tl.tensor, b: tl.tensor, out: tl.tensor,
    rows: tl.tensor, columns: tl.tensor, length: tl.tensor,
    a_size: tl.tensor, b_size: tl.tensor, out_size: tl.tensor,
    a_row: tl.tensor, a_inner: tl.tensor, a_group: tl.tensor,
    b_inner: tl.tensor, b_column: tl.tensor, b_group: tl.tensor,
    out_row: tl.tensor, out_column: tl.tensor, out_group: tl.tensor,
    SIGN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    """out[m, n, p] = sum over q and k of a[m, k, q] b[k, n, p + SIGN q], per group; b is 0 outside.

    p, q and the positions of b run over out_size^2, a_size^2 and b_size^2 and are the fastest index of their tensor;
    strides are in elements. A program has one group and a tile [M, N] of m and (n, p).
    """
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(rows, M)
    tiles_n = tl.cdiv(columns * out_size * out_size, N)
    group = (tile // (tiles_m * tiles_n)).to(tl.int64)
    m = tile % tiles_m * M + tl.arange(0, M)
    n_p = tile // tiles_m % tiles_n * N + tl.arange(0, N)
    n = n_p // (out_size * out_size)
    p = n_p % (out_size * out_size)
    p_h = p // out_size
    p_w = p % out_size
    a += group * a_group + (m.to(tl.int64) * a_row)[:, None]
    b += group * b_group + (n.to(tl.int64) * b_column)[None, :]
    total = tl.zeros((M, N), DTYPE)
    for q in range(loop_bound(a_size * a_size)):
        b_h = p_h + SIGN * (q // a_size)
        b_w = p_w + SIGN * (q % a_size)
        in_b = (n < columns) & (b_h >= 0) & (b_h < b_size) & (b_w >= 0) & (b_w < b_size)
        b_at = b + (b_h * b_size + b_w)[None, :]
        for start in range(0, loop_bound(length), K):
            k = start + tl.arange(0, K)
            in_a = (m < rows)[:, None] & (k < length)[None, :]
            left = tl.load(a + (k.to(tl.int64) * a_inner + q)[None, :], mask=in_a, other=0)
            in_right = (k < length)[:, None] & in_b[None, :]
            right = tl.load(b_at + (k.to(tl.int64) * b_inner)[:, None], mask=in_right, other=0)
            total = tile_product(left, right, total, PRECISION)
    out += group * out_group + (n.to(tl.int64) * out_column + p)[None, :]
    tl.store(out + (m.to(tl.int64) * out_row)[:, None], total, mask=(m < rows)[:, None] & (n < columns)[None, :])
