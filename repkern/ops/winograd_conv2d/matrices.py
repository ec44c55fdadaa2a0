"""The matrices of F(m x m, 3x3), and of stride 2: made from their points, exact where the points are dyadic."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["POINTS", "STRIDE2_POINTS", "STRIDE2_TILE", "TILES", "Matrices", "matrices", "stride2_matrices"]

# Infinity is one more point of each. Small magnitudes in +- pairs keep the transforms well conditioned; powers of two
# in the denominators make every entry of A and B a float32 number. csrc/winograd_conv2d/winograd_conv2d.h has the same.
POINTS: dict[int, tuple[Fraction, ...]] = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
    5: (Fraction(3, 8), Fraction(-3, 8), Fraction(7, 8), Fraction(-7, 8), Fraction(7, 4), Fraction(-7, 4)),
    6: (Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-2), Fraction(1, 2), Fraction(-1, 2)),
}
TILES = tuple(POINTS)
# Stride 2: F(4 x 4, 2x2) on the even inputs.
STRIDE2_TILE = 4
STRIDE2_POINTS = (Fraction(3, 8), Fraction(-3, 8), Fraction(5, 4), Fraction(-5, 4))


class Matrices(NamedTuple):
    """out = A [ (G w G^T) * (B d B^T) ] A^T for a kernel w [3, 3] and a patch d [r, r]; float64, on the CPU.

    r = m + 2 with stride 1, 2 m + 1 with stride 2.
    """

    a: Tensor  # [m, r]
    b: Tensor  # [r, r]
    g: Tensor  # [r, 3]


def _times(one: list[Fraction], root: Fraction) -> list[Fraction]:
    """The coefficients (lowest first) of one(x) * (x - root)."""
    return [(one[i - 1] if i else 0) - (root * one[i] if i < len(one) else 0) for i in range(len(one) + 1)]  # type: ignore[misc]


@functools.cache
def matrices(tile: int) -> Matrices:
    """A, B and G of F(tile x tile, 3x3) by the Toom-Cook construction (docs/ops/winograd_conv2d.md)."""
    return _toom_cook(POINTS[tile], tile, 3)


@functools.cache
def stride2_matrices() -> Matrices:
    """A, B and G of 3x3 kernels with stride 2, m = STRIDE2_TILE: r = 2 m + 1 positions, of which m + 2 weights differ.

    The even inputs are a convolution with the taps 0 and 2, by F(m, 2) on m + 1 points; the odd ones meet tap 1 alone.
    Positions: those points, then the m odd inputs, whose rows of G are all the same.
    """
    m, points = STRIDE2_TILE, STRIDE2_TILE + 1
    even = _toom_cook(STRIDE2_POINTS, m, 2)
    a, b, g = torch.eye(m, 2 * m + 1), torch.zeros(2 * m + 1, 2 * m + 1), torch.zeros(2 * m + 1, 3)
    a, b, g = (matrix.double() for matrix in (a.roll(points, 1), b, g))
    a[:, :points] = even.a
    b[:points, 0::2], b[points:, 1::2] = even.b, torch.eye(m)
    g[:points, 0::2], g[points:, 1] = even.g, 1
    return Matrices(a, b, g)


def _toom_cook(points: tuple[Fraction, ...], tile: int, taps: int) -> Matrices:
    """A [tile, n], B [n, n] and G [n, taps] of F(tile, taps), n = tile + taps - 1: `points` and infinity."""
    size = tile + taps - 1
    one = Fraction(1)
    a = [[p**row for p in points] + [one if row == tile - 1 else Fraction(0)] for row in range(tile)]
    b: list[list[Fraction]] = []
    g: list[list[Fraction]] = []
    for p in points:
        others, scale = [one], one
        for q in points:
            if q != p:
                others, scale = _times(others, q), scale * (p - q)
        b.append(others + [Fraction(0)] * (size - len(others)))
        g.append([p**power / scale for power in range(taps)])
    everything = [one]
    for q in points:
        everything = _times(everything, q)
    b.append(everything)
    g.append([Fraction(0)] * (taps - 1) + [one])
    return Matrices(
        *(torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64) for rows in (a, b, g))
    )
