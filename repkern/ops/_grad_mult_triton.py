"""What the Triton kernels of the optimizer steps share: M of a chunk, and the launch over a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from repkern.ops._grad_mult import Packed, state_dtype
from repkern.ops._grad_mult_plan import Plan
from repkern.ops._grad_mult_tables import constant_table, moving_table, number_view, static_table
from repkern.ops._triton import TL_DTYPE, on_device

__all__ = ["BLOCK", "launch", "multiplier", "pointer_of", "rounded"]

BLOCK = 1024


@triton.jit
def pointer_of(column: tl.tensor, at: tl.tensor, X: tl.constexpr) -> tl.tensor:
    """The address in row `at` of a column of the table."""
    return tl.load(column + at).to(tl.pointer_type(X))


@triton.jit
def multiplier(
    addresses: tl.tensor, numbers: tl.tensor, shapes: tl.tensor, count: tl.tensor, at: tl.tensor, begin: tl.tensor,
    mask: tl.tensor, T: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """M at BLOCK places from `begin` on, 1 where there is none. Columns: csrc/common/grad_mult.h."""
    # Of a block's shape: the interpreter takes no mask that was combined with a scalar.
    kind = tl.zeros([BLOCK], tl.int64) + tl.load(shapes + count + at)
    row = tl.load(shapes + 2 * count + at)
    taps = tl.load(shapes + 3 * count + at).to(tl.int32)
    inner = tl.load(shapes + 4 * count + at).to(tl.int32)
    diagonal = tl.load(shapes + 5 * count + at)
    # Divisions of 32 bits: a row is shorter than 2^30. Dense multipliers have no rows.
    divisor = tl.where(kind == 3, 1 << 30, row)
    first = begin // divisor
    start = (begin - first * divisor).to(tl.int32) + tl.arange(0, BLOCK)
    skipped = start // divisor.to(tl.int32)
    r = start - skipped * divisor.to(tl.int32)
    o = first + skipped
    last = inner > 1
    cut = tl.where(last, inner, taps)
    high = r // cut
    low = r - high * cut
    tap = tl.where(last, high, low)
    channel = tl.where(last, low, high)
    index = tl.where(kind == 3, begin + tl.arange(0, BLOCK), o)
    m = tl.load(pointer_of(addresses + 6 * count, at, T) + index, mask=mask & (kind != 0), other=1)
    middle = mask & (kind == 2) & (tap == taps // 2)
    m += tl.load(pointer_of(addresses + 7 * count, at, T) + o, mask=middle, other=0)
    one = tl.load(numbers + 2 * count + at).to(T)
    return m + tl.where(middle & (channel == o % diagonal), one, 0)


@triton.jit
def rounded(value: tl.tensor, X: tl.constexpr) -> tl.tensor:
    """`value` as X, to nearest even. By hand for bfloat16: the interpreter would cut off."""
    if X == tl.bfloat16:  # noqa: SIM300 (a type on the left is no constant for Triton)
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)  # NaN could become 0
    return value.to(X)


def launch(
    kernel: Any,
    plan: Plan,
    lists: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    packed: Packed,
    numbers: tuple[Sequence[float], Sequence[float], Sequence[int]],
    constants: tuple[float, ...],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **options: bool,
) -> None:
    """One launch for each dtype, a program a chunk."""
    stream = torch.cuda.current_stream(plan.device).cuda_stream if plan.device.type == "cuda" else 0
    static = static_table(plan, BLOCK, stream)
    moving = moving_table(plan, lists, steps, packed, *numbers, stream)
    values = constant_table(constants, plan.device, stream)
    count = len(plan.tensors)
    flags = [moving if flag is None else flag for flag in (grad_scale, found_inf)]
    with on_device(plan.device):
        for dtype, first, programs in static.launches:
            kernel[(programs,)](
                moving, number_view(moving, count), static.shapes, static.chunks[first:], values, *flags, count,
                X=TL_DTYPE[dtype], T=TL_DTYPE[state_dtype(dtype)],
                SCALED=grad_scale is not None, CHECKED=found_inf is not None, BLOCK=BLOCK, **options,
            )  # fmt: skip
