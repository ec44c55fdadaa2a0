"""The matrices of F(m x m, 3x3): made from their points, exact where the points are dyadic."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["POINTS", "TILES", "Matrices", "matrices"]

# Infinity is one more point of each. Small magnitudes in +- pairs keep the transforms well conditioned; powers of two
# in the denominators make every entry of A and B a float32 number. csrc/winograd_conv2d/winograd_conv2d.h has the same.
POINTS: dict[int, tuple[Fraction, ...]] = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
    6: (Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-2), Fraction(1, 2), Fraction(-1, 2)),
}
TILES = tuple(POINTS)


class Matrices(NamedTuple):
    """out = A [ (G w G^T) * (B d B^T) ] A^T for a kernel w [3, 3] and a patch d [m + 2, m + 2]; float64, on the CPU."""

    a: Tensor  # [m, m + 2]
    b: Tensor  # [m + 2, m + 2]
    g: Tensor  # [m + 2, 3]


def _times(one: list[Fraction], root: Fraction) -> list[Fraction]:
    """The coefficients (lowest first) of one(x) * (x - root)."""
    return [(one[i - 1] if i else 0) - (root * one[i] if i < len(one) else 0) for i in range(len(one) + 1)]  # type: ignore[misc]


@functools.cache
def matrices(tile: int) -> Matrices:
    """A, B and G of F(tile x tile, 3x3) by the Toom-Cook construction (docs/ops/winograd_conv2d.md)."""
    points = POINTS[tile]
    size = tile + 2
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
        g.append([p**power / scale for power in range(3)])
    everything = [one]
    for q in points:
        everything = _times(everything, q)
    b.append(everything)
    g.append([Fraction(0), Fraction(0), one])
    return Matrices(
        *(torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64) for rows in (a, b, g))
    )
