"""The Triton kernel of grad_mult_adamw_. Math: docs/ops/grad_mult_adamw.md; the host side is triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from repkern.ops._grad_mult_triton import multiplier, pointer_of, rounded

__all__ = ["adamw_kernel"]

MOST_BITS = tl.constexpr(24)  # of a number of steps: float32 counts no further


@triton.jit
def power(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """base ** exponent in float64 by squaring: exp and log would lose digits of 1 - beta ** t."""
    left = exponent.to(tl.int32)
    answer = base * 0 + 1
    for _ in tl.static_range(MOST_BITS):
        answer = tl.where(left % 2 == 1, answer * base, answer)
        base = base * base
        left = left // 2
    return answer


@triton.jit
def adamw_kernel(
    addresses: tl.tensor, numbers: tl.tensor, shapes: tl.tensor, chunks: tl.tensor, constants: tl.tensor,
    grad_scale: tl.tensor, found_inf: tl.tensor, count: tl.tensor,
    X: tl.constexpr, T: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr, MULTIPLY_UPDATE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A step for one chunk. `constants`: the sign of gradients, beta1, beta2, 1 - beta1, 1 - beta2, eps."""
    at = tl.load(chunks + 2 * tl.program_id(0))
    begin = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    place = begin + tl.arange(0, BLOCK)
    size = tl.load(shapes + at)
    if CHECKED:
        size = tl.where(tl.load(found_inf) == 0, size, 0)
    mask = place < size
    m = multiplier(addresses, numbers, shapes, count, at, begin, mask, T, BLOCK)
    g = tl.load(pointer_of(addresses + count, at, X) + place, mask=mask, other=0).to(T)
    factor = tl.load(constants)
    if SCALED:
        factor = factor / tl.load(grad_scale).to(tl.float64)
    g = g * factor.to(T) * m
    param = pointer_of(addresses, at, X) + place
    value = tl.load(param, mask=mask, other=0).to(T)
    lr = tl.load(numbers + at)
    decay = tl.load(numbers + count + at)
    if DECOUPLED:
        value = value * (1 - lr * decay).to(T)
    else:
        g += decay.to(T) * value
    mean_at = pointer_of(addresses + 2 * count, at, T) + place
    mean = tl.load(mean_at, mask=mask, other=0)
    mean += tl.load(constants + 3).to(T) * (g - mean)
    tl.store(mean_at, mean, mask=mask)
    square_at = pointer_of(addresses + 3 * count, at, T) + place
    square = tl.load(constants + 2).to(T) * tl.load(square_at, mask=mask, other=0)
    square += tl.load(constants + 4).to(T) * g * g
    tl.store(square_at, square, mask=mask)
    if AMSGRAD:
        largest_at = pointer_of(addresses + 4 * count, at, T) + place
        largest = tl.load(largest_at, mask=mask, other=0)
        # Not maximum(): a NaN must stay one.
        square = tl.where(largest > square, largest, square)
        tl.store(largest_at, square, mask=mask)
    taken = tl.load(pointer_of(addresses + 5 * count, at, tl.float32)) + 1
    rate = (lr / (1 - power(tl.load(constants + 1), taken))).to(T)
    root_factor = (1 / tl.sqrt(1 - power(tl.load(constants + 2), taken))).to(T)
    if MULTIPLY_UPDATE:
        mean = m * mean
    value -= rate * mean / (tl.sqrt(square) * root_factor + tl.load(constants + 5).to(T))
    tl.store(param, rounded(value, X), mask=mask)
