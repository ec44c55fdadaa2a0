"""The Triton kernels of orepa_squeeze. Math: docs/ops/orepa_squeeze.md; the host side is triton.py.

Every kernel serves many layers: `table` [layers, COLUMNS] int64 holds a layer's sizes and addresses (0: absent), and
a program finds its layer from the first tile of each (rows that pad the table start past the last tile). Letters:
c counts groups, o, i, t output, input and internal channels (i and t within their group), tap the K*K positions, and
r = (o within its group) * K*K + tap. Capitals are tile extents.
"""

from __future__ import annotations

import triton
import triton.language as tl

from repkern.ops._triton import loop_bound, tile_product

__all__ = ["COLUMNS", "SUM_COLUMNS", "expand_kernel", "forward_kernel", "reduce_kernel", "rest_kernel", "sum_kernel"]

# fmt: off
COLUMNS = (
    "first_tile", "first_reduce_tile", "first_rest_tile",
    "co", "cig", "cmg", "groups", "taps", "expansion", "identity", "split_length",
    "origin", "avg", "prior", "pointwise", "reduce", "expand", "depthwise", "project", "prior_filter",
    "scale", "scale_avg", "scale_prior", "scale_expand", "scale_pointwise", "scale_project",
    "kernel", "kernel_stride_o", "kernel_stride_i", "kernel_stride_tap",
    "d_origin", "d_avg", "d_prior", "d_pointwise", "d_reduce", "d_expand", "d_depthwise", "d_project",
    "d_scale", "d_scale_avg", "d_scale_prior", "d_scale_expand", "d_scale_pointwise", "d_scale_project",
)
WIDTH = tl.constexpr(len(COLUMNS))
(
    FIRST_TILE, FIRST_REDUCE_TILE, FIRST_REST_TILE,
    CO, CIG, CMG, GROUPS, TAPS, EXPANSION, IDENTITY, SPLIT_LENGTH,
    ORIGIN, AVG, PRIOR, POINTWISE, REDUCE, EXPAND, DEPTHWISE, PROJECT, PRIOR_FILTER,
    SCALE, SCALE_AVG, SCALE_PRIOR, SCALE_EXPAND, SCALE_POINTWISE, SCALE_PROJECT,
    KERNEL, KERNEL_STRIDE_O, KERNEL_STRIDE_I, KERNEL_STRIDE_TAP,
    D_ORIGIN, D_AVG, D_PRIOR, D_POINTWISE, D_REDUCE, D_EXPAND, D_DEPTHWISE, D_PROJECT,
    D_SCALE, D_SCALE_AVG, D_SCALE_PRIOR, D_SCALE_EXPAND, D_SCALE_POINTWISE, D_SCALE_PROJECT,
) = (tl.constexpr(column) for column in range(len(COLUMNS)))

SUM_COLUMNS = ("first_tile", "source", "target", "count", "terms", "stride", "stride_term")
SUM_WIDTH = tl.constexpr(len(SUM_COLUMNS))
(
    SUM_FIRST_TILE, SUM_SOURCE, SUM_TARGET, SUM_COUNT, SUM_TERMS, SUM_STRIDE, SUM_STRIDE_TERM,
) = (tl.constexpr(column) for column in range(len(SUM_COLUMNS)))
# fmt: on


@triton.jit
def _find(
    table: tl.tensor, COLUMN: tl.constexpr, ROW: tl.constexpr, ENTRIES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The table row this program works on and its tile within it."""
    program = tl.program_id(0)
    first = tl.load(table + tl.arange(0, ENTRIES) * ROW + COLUMN)
    entry = tl.sum((first <= program).to(tl.int32), axis=0) - 1
    row = table + entry * ROW
    return row, program - tl.load(row + COLUMN).to(tl.int32)


@triton.jit
def _size(row: tl.tensor, COLUMN: tl.constexpr) -> tl.tensor:
    return tl.load(row + COLUMN).to(tl.int32)


@triton.jit
def _pointer(row: tl.tensor, COLUMN: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    return tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))


@triton.jit
def _scale(row: tl.tensor, COLUMN: tl.constexpr, o: tl.tensor, mask: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The branch's scale of each output channel; ones where it has none."""
    value = tl.full(o.shape, 1, DTYPE)
    if tl.load(row + COLUMN) != 0:
        value = tl.load(_pointer(row, COLUMN, DTYPE) + o, mask=mask, other=0)
    return value


@triton.jit
def _reduce_tile(row: tl.tensor, c: tl.tensor, t: tl.tensor, i: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """reduce[t, i] of group c, the identity included; t and i broadcast against each other."""
    cig = _size(row, CIG)
    cmg = _size(row, CMG)
    inside = (t < cmg) & (i < cig)
    at = (c * cmg + t).to(tl.int64) * cig + i
    tile = tl.load(_pointer(row, REDUCE, DTYPE) + at, mask=inside, other=0)
    if _size(row, IDENTITY) != 0:
        tile += ((t % cig == i) & inside).to(DTYPE)
    return tile


@triton.jit
def _rest_of_kernel(
    row: tl.tensor,
    c: tl.tensor,
    o: tl.tensor,
    tap: tl.tensor,
    in_r: tl.tensor,
    i: tl.tensor,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> tl.tensor:
    """The scaled sum of the five branches that are no matrix product: [ROWS, INPUTS]."""
    cig = _size(row, CIG)
    taps = _size(row, TAPS)
    expansion = _size(row, EXPANSION)
    inside = in_r[:, None] & (i < cig)[None, :]
    at = o[:, None] * cig + i[None, :]
    total = tl.zeros((ROWS, INPUTS), DTYPE)
    if tl.load(row + ORIGIN) != 0:
        kernel = tl.load(_pointer(row, ORIGIN, DTYPE) + at * taps + tap[:, None], mask=inside, other=0)
        total += kernel * _scale(row, SCALE, o, in_r, DTYPE)[:, None]
    if tl.load(row + AVG) != 0:
        kernel = tl.load(_pointer(row, AVG, DTYPE) + at, mask=inside, other=0) / taps.to(DTYPE)
        total += kernel * _scale(row, SCALE_AVG, o, in_r, DTYPE)[:, None]
    if tl.load(row + PRIOR) != 0:
        wave = tl.load(_pointer(row, PRIOR_FILTER, DTYPE) + o * taps + tap, mask=in_r, other=0)
        kernel = tl.load(_pointer(row, PRIOR, DTYPE) + at, mask=inside, other=0) * wave[:, None]
        total += kernel * _scale(row, SCALE_PRIOR, o, in_r, DTYPE)[:, None]
    if tl.load(row + POINTWISE) != 0:
        centre = inside & (tap == taps // 2)[:, None]
        kernel = tl.load(_pointer(row, POINTWISE, DTYPE) + at, mask=centre, other=0)
        total += kernel * _scale(row, SCALE_POINTWISE, o, in_r, DTYPE)[:, None]
    if tl.load(row + PROJECT) != 0:
        project = _pointer(row, PROJECT, DTYPE) + at * expansion
        channel = (c * cig + i).to(tl.int64) * expansion
        depthwise = _pointer(row, DEPTHWISE, DTYPE) + channel[None, :] * taps + tap[:, None]
        kernel = tl.zeros((ROWS, INPUTS), DTYPE)
        for q in range(loop_bound(expansion)):
            weight = tl.load(project + q, mask=inside, other=0)
            kernel += weight * tl.load(depthwise + q * taps, mask=inside, other=0)
        total += kernel * _scale(row, SCALE_PROJECT, o, in_r, DTYPE)[:, None]
    return total


@triton.jit
def forward_kernel(
    table: tl.tensor, LAYERS: tl.constexpr, DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """kernel[(o, tap), i], a tile [ROWS, INPUTS] a program: expand @ reduce, then the other branches, one store."""
    row, tile = _find(table, FIRST_TILE, WIDTH, LAYERS)
    cig = _size(row, CIG)
    cmg = _size(row, CMG)
    taps = _size(row, TAPS)
    cog = _size(row, CO) // _size(row, GROUPS)
    tiles_i = tl.cdiv(cig, INPUTS)
    tiles_r = tl.cdiv(cog * taps, ROWS)
    c = tile // (tiles_i * tiles_r)
    i = tile % tiles_i * INPUTS + tl.arange(0, INPUTS)
    r = tile // tiles_i % tiles_r * ROWS + tl.arange(0, ROWS)
    in_r = r < cog * taps
    tap = r % taps
    o = (c * cog + r // taps).to(tl.int64)
    total = tl.zeros((ROWS, INPUTS), DTYPE)
    if tl.load(row + EXPAND) != 0:
        expand = _pointer(row, EXPAND, DTYPE) + (o * cmg * taps + tap)[:, None]
        for start in range(0, loop_bound(cmg), STEP):
            t = start + tl.arange(0, STEP)
            a = tl.load(expand + (t * taps)[None, :], mask=in_r[:, None] & (t < cmg)[None, :], other=0)
            total = tile_product(a, _reduce_tile(row, c, t[:, None], i[None, :], DTYPE), total, PRECISION)
        total *= _scale(row, SCALE_EXPAND, o, in_r, DTYPE)[:, None]
    total += _rest_of_kernel(row, c, o, tap, in_r, i, DTYPE, ROWS, INPUTS)
    row_at = o * _size(row, KERNEL_STRIDE_O) + tap * _size(row, KERNEL_STRIDE_TAP)
    at = row_at[:, None] + (i * _size(row, KERNEL_STRIDE_I))[None, :]
    inside = in_r[:, None] & (i < cig)[None, :]
    if tl.bfloat16 == OUT_DTYPE:
        total = total.to(tl.float32)  # GPUs convert to bfloat16 from float32 only
    tl.store(_pointer(row, KERNEL, OUT_DTYPE) + at, total.to(OUT_DTYPE), mask=inside)


@triton.jit
def expand_kernel(
    table: tl.tensor, LAYERS: tl.constexpr, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, INTERNAL: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """d_expand[(o, tap), t], a tile [ROWS, INTERNAL] a program, and its share of the branch's scale gradient."""
    row, tile = _find(table, FIRST_TILE, WIDTH, LAYERS)
    cig = _size(row, CIG)
    cmg = _size(row, CMG)
    taps = _size(row, TAPS)
    cog = _size(row, CO) // _size(row, GROUPS)
    tiles_t = tl.cdiv(cmg, INTERNAL)
    tiles_r = tl.cdiv(cog * taps, ROWS)
    c = tile // (tiles_t * tiles_r)
    t = tile % tiles_t * INTERNAL + tl.arange(0, INTERNAL)
    r = tile // tiles_t % tiles_r * ROWS + tl.arange(0, ROWS)
    in_r = r < cog * taps
    tap = r % taps
    o = (c * cog + r // taps).to(tl.int64)
    grad_at = o * _size(row, KERNEL_STRIDE_O) + tap * _size(row, KERNEL_STRIDE_TAP)
    grad = _pointer(row, KERNEL, GRAD_DTYPE) + grad_at[:, None]
    total = tl.zeros((ROWS, INTERNAL), DTYPE)
    for start in range(0, loop_bound(cig), STEP):
        i = start + tl.arange(0, STEP)
        inside_i = in_r[:, None] & (i < cig)[None, :]
        a = tl.load(grad + (i * _size(row, KERNEL_STRIDE_I))[None, :], mask=inside_i, other=0).to(DTYPE)
        total = tile_product(a, _reduce_tile(row, c, t[None, :], i[:, None], DTYPE), total, PRECISION)
    inside = in_r[:, None] & (t < cmg)[None, :]
    at = (o * cmg * taps + tap)[:, None] + (t * taps)[None, :]
    if tl.load(row + D_SCALE_EXPAND) != 0:
        expand = tl.load(_pointer(row, EXPAND, DTYPE) + at, mask=inside, other=0)
        shares = _pointer(row, D_SCALE_EXPAND, DTYPE) + (o * taps + tap) * tiles_t + tile % tiles_t
        tl.store(shares, tl.sum(total * expand, axis=1), mask=in_r)
    total *= _scale(row, SCALE_EXPAND, o, in_r, DTYPE)[:, None]
    tl.store(_pointer(row, D_EXPAND, DTYPE) + at, total, mask=inside)


@triton.jit
def reduce_kernel(
    table: tl.tensor, LAYERS: tl.constexpr, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, INTERNAL: tl.constexpr, INPUTS: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """d_reduce[t, i], a tile [INTERNAL, INPUTS] a program, summed over the program's share of the rows (o, tap)."""
    row, tile = _find(table, FIRST_REDUCE_TILE, WIDTH, LAYERS)
    cig = _size(row, CIG)
    cmg = _size(row, CMG)
    taps = _size(row, TAPS)
    groups = _size(row, GROUPS)
    cog = _size(row, CO) // groups
    tiles_i = tl.cdiv(cig, INPUTS)
    tiles_t = tl.cdiv(cmg, INTERNAL)
    i = tile % tiles_i * INPUTS + tl.arange(0, INPUTS)
    t = tile // tiles_i % tiles_t * INTERNAL + tl.arange(0, INTERNAL)
    c = tile // (tiles_i * tiles_t) % groups
    split = tile // (tiles_i * tiles_t * groups)
    length = _size(row, SPLIT_LENGTH)
    expand = _pointer(row, EXPAND, DTYPE) + (t * taps)[:, None]
    grad = _pointer(row, KERNEL, GRAD_DTYPE) + (i * _size(row, KERNEL_STRIDE_I))[None, :]
    end = tl.minimum((split + 1) * length, cog * taps)
    total = tl.zeros((INTERNAL, INPUTS), DTYPE)
    for start in range(loop_bound(split * length), loop_bound(end), STEP):
        r = start + tl.arange(0, STEP)
        in_r = r < cog * taps
        tap = r % taps
        o = (c * cog + r // taps).to(tl.int64)
        a = tl.load(expand + (o * cmg * taps + tap)[None, :], mask=(t < cmg)[:, None] & in_r[None, :], other=0)
        a *= _scale(row, SCALE_EXPAND, o, in_r, DTYPE)[None, :]
        grad_at = o * _size(row, KERNEL_STRIDE_O) + tap * _size(row, KERNEL_STRIDE_TAP)
        b = tl.load(grad + grad_at[:, None], mask=in_r[:, None] & (i < cig)[None, :], other=0).to(DTYPE)
        total = tile_product(a, b, total, PRECISION)
    at = ((split * groups + c) * cmg + t).to(tl.int64)[:, None] * cig + i[None, :]
    tl.store(_pointer(row, D_REDUCE, DTYPE) + at, total, mask=(t < cmg)[:, None] & (i < cig)[None, :])


@triton.jit
def _store_scale_share(
    row: tl.tensor, COLUMN: tl.constexpr, values: tl.tensor, at: tl.tensor, mask: tl.tensor, DTYPE: tl.constexpr
) -> None:
    if tl.load(row + COLUMN) != 0:
        tl.store(_pointer(row, COLUMN, DTYPE) + at, tl.sum(values, axis=1), mask=mask)


@triton.jit
def _elementwise_gradients(
    row: tl.tensor,
    grad: tl.tensor,
    o: tl.tensor,
    i: tl.tensor,
    in_o: tl.tensor,
    share: tl.tensor,
    DTYPE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    """Gradients of origin, avg, prior and pointwise and their scale gradients, from one reading of the gradient."""
    cig = _size(row, CIG)
    taps = _size(row, TAPS)
    inside = in_o[:, None] & (i < cig)[None, :]
    at = o[:, None] * cig + i[None, :]
    mean = tl.zeros((OUTPUTS, INPUTS), DTYPE)
    wave = tl.zeros((OUTPUTS, INPUTS), DTYPE)
    centre = tl.zeros((OUTPUTS, INPUTS), DTYPE)
    product = tl.zeros((OUTPUTS, INPUTS), DTYPE)
    scale_origin = _scale(row, SCALE, o, in_o, DTYPE)
    for tap in range(loop_bound(taps)):
        g = tl.load(grad + tap * _size(row, KERNEL_STRIDE_TAP), mask=inside, other=0).to(DTYPE)
        mean += g
        if tap == taps // 2:
            centre = g
        if tl.load(row + ORIGIN) != 0:
            product += g * tl.load(_pointer(row, ORIGIN, DTYPE) + at * taps + tap, mask=inside, other=0)
            tl.store(_pointer(row, D_ORIGIN, DTYPE) + at * taps + tap, g * scale_origin[:, None], mask=inside)
        if tl.load(row + PRIOR) != 0:
            wave += g * tl.load(_pointer(row, PRIOR_FILTER, DTYPE) + o * taps + tap, mask=in_o, other=0)[:, None]
    _store_scale_share(row, D_SCALE, product, share, in_o, DTYPE)
    if tl.load(row + AVG) != 0:
        mean = mean / taps.to(DTYPE)
        avg = tl.load(_pointer(row, AVG, DTYPE) + at, mask=inside, other=0)
        _store_scale_share(row, D_SCALE_AVG, avg * mean, share, in_o, DTYPE)
        mean *= _scale(row, SCALE_AVG, o, in_o, DTYPE)[:, None]
        tl.store(_pointer(row, D_AVG, DTYPE) + at, mean, mask=inside)
    if tl.load(row + PRIOR) != 0:
        prior = tl.load(_pointer(row, PRIOR, DTYPE) + at, mask=inside, other=0)
        _store_scale_share(row, D_SCALE_PRIOR, prior * wave, share, in_o, DTYPE)
        wave *= _scale(row, SCALE_PRIOR, o, in_o, DTYPE)[:, None]
        tl.store(_pointer(row, D_PRIOR, DTYPE) + at, wave, mask=inside)
    if tl.load(row + POINTWISE) != 0:
        pointwise = tl.load(_pointer(row, POINTWISE, DTYPE) + at, mask=inside, other=0)
        _store_scale_share(row, D_SCALE_POINTWISE, pointwise * centre, share, in_o, DTYPE)
        centre *= _scale(row, SCALE_POINTWISE, o, in_o, DTYPE)[:, None]
        tl.store(_pointer(row, D_POINTWISE, DTYPE) + at, centre, mask=inside)


@triton.jit
def _depthwise_gradients(
    row: tl.tensor, grad: tl.tensor, o: tl.tensor, c: tl.tensor, tile_o: tl.tensor, i: tl.tensor, q: tl.tensor,
    in_o: tl.tensor, share: tl.tensor,
    DTYPE: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of column i*e + q of project and, summed over the o of this tile, of that depthwise filter."""
    cig = _size(row, CIG)
    taps = _size(row, TAPS)
    expansion = _size(row, EXPANSION)
    inside = in_o[:, None] & (i < cig)[None, :]
    at = (o[:, None] * cig + i[None, :]) * expansion + q
    scale = _scale(row, SCALE_PROJECT, o, in_o, DTYPE)[:, None]
    weight = tl.load(_pointer(row, PROJECT, DTYPE) + at, mask=inside, other=0)
    filters = ((c * cig + i).to(tl.int64) * expansion + q) * taps
    shares = (tile_o * cig * _size(row, GROUPS)).to(tl.int64) * expansion * taps + filters
    product = tl.zeros((OUTPUTS, INPUTS), DTYPE)
    for tap in range(loop_bound(taps)):
        g = tl.load(grad + tap * _size(row, KERNEL_STRIDE_TAP), mask=inside, other=0).to(DTYPE)
        depthwise = tl.load(_pointer(row, DEPTHWISE, DTYPE) + filters + tap, mask=i < cig, other=0)
        product += g * depthwise[None, :]
        tl.store(_pointer(row, D_DEPTHWISE, DTYPE) + shares + tap, tl.sum(g * scale * weight, axis=0), mask=i < cig)
    _store_scale_share(row, D_SCALE_PROJECT, product * weight, share, in_o, DTYPE)
    tl.store(_pointer(row, D_PROJECT, DTYPE) + at, product * scale, mask=inside)


@triton.jit
def rest_kernel(
    table: tl.tensor, LAYERS: tl.constexpr, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
) -> None:  # fmt: skip
    """All gradients but those of reduce and expand, for a tile [OUTPUTS, INPUTS] of one group.

    The tile's part 0 is the elementwise branches, part 1 + q the q-th filter of each channel of the dw-pw branch.
    """
    row, tile = _find(table, FIRST_REST_TILE, WIDTH, LAYERS)
    cig = _size(row, CIG)
    expansion = _size(row, EXPANSION)
    cog = _size(row, CO) // _size(row, GROUPS)
    tiles_i = tl.cdiv(cig, INPUTS)
    tiles_o = tl.cdiv(cog, OUTPUTS)
    part = tile % (1 + expansion)
    tile_i = tile // (1 + expansion) % tiles_i
    tile_o = tile // ((1 + expansion) * tiles_i) % tiles_o
    c = tile // ((1 + expansion) * tiles_i * tiles_o)
    i = tile_i * INPUTS + tl.arange(0, INPUTS)
    of_group = tile_o * OUTPUTS + tl.arange(0, OUTPUTS)
    in_o = of_group < cog
    o = (c * cog + of_group).to(tl.int64)
    at = (o * _size(row, KERNEL_STRIDE_O))[:, None] + (i * _size(row, KERNEL_STRIDE_I))[None, :]
    grad = _pointer(row, KERNEL, GRAD_DTYPE) + at
    share = o * tiles_i + tile_i
    if part == 0:
        _elementwise_gradients(row, grad, o, i, in_o, share, DTYPE, OUTPUTS, INPUTS)
    else:
        q = part - 1
        _depthwise_gradients(row, grad, o, c, tile_o, i, q, in_o, share * expansion + q, DTYPE, OUTPUTS, INPUTS)


@triton.jit
def sum_kernel(table: tl.tensor, SUMS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """target[n] = sum over m of source[n * stride + m * stride_term], in the order of m."""
    row, tile = _find(table, SUM_FIRST_TILE, SUM_WIDTH, SUMS)
    n = tile * BLOCK + tl.arange(0, BLOCK)
    inside = n < _size(row, SUM_COUNT)
    source = _pointer(row, SUM_SOURCE, DTYPE) + n.to(tl.int64) * tl.load(row + SUM_STRIDE)
    total = tl.zeros((BLOCK,), DTYPE)
    for term in range(loop_bound(_size(row, SUM_TERMS))):
        total += tl.load(source + term * tl.load(row + SUM_STRIDE_TERM), mask=inside, other=0)
    tl.store(_pointer(row, SUM_TARGET, DTYPE) + n, total, mask=inside)
