"""The Triton kernel of grad_mult_sgd_. Math: docs/ops/grad_mult_sgd.md; the host side is triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from repkern.ops._grad_mult_triton import multiplier, pointer_of, rounded

__all__ = ["sgd_kernel"]


@triton.jit
def sgd_kernel(
    addresses: tl.tensor, numbers: tl.tensor, shapes: tl.tensor, chunks: tl.tensor, constants: tl.tensor,
    grad_scale: tl.tensor, found_inf: tl.tensor, count: tl.tensor,
    X: tl.constexpr, T: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, MOVES: tl.constexpr,
    NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A step for one chunk. `constants`: the sign of gradients, momentum, 1 - dampening."""
    at = tl.load(chunks + 2 * tl.program_id(0))
    begin = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    place = begin + tl.arange(0, BLOCK)
    size = tl.load(shapes + at)
    if CHECKED:
        size = tl.where(tl.load(found_inf) == 0, size, 0)
    mask = place < size
    param = pointer_of(addresses, at, X) + place
    g = tl.load(pointer_of(addresses + count, at, X) + place, mask=mask, other=0).to(T)
    factor = tl.load(constants)
    if SCALED:
        factor = factor / tl.load(grad_scale).to(tl.float64)
    g = g * factor.to(T) * multiplier(addresses, numbers, shapes, count, at, begin, mask, T, BLOCK)
    value = tl.load(param, mask=mask, other=0).to(T)
    g += tl.load(numbers + count + at).to(T) * value
    if MOVES:
        momentum = tl.load(constants + 1).to(T)
        buffer = pointer_of(addresses + 2 * count, at, T) + place
        first = tl.zeros([BLOCK], tl.int64) + tl.load(addresses + 8 * count + at) != 0
        old = tl.load(buffer, mask=mask & (first == 0), other=0)
        moved = tl.where(first, g, momentum * old + tl.load(constants + 2).to(T) * g)
        tl.store(buffer, moved, mask=mask)
        g = g + momentum * moved if NESTEROV else moved
    tl.store(param, rounded(value - tl.load(numbers + at).to(T) * g, X), mask=mask)
