"""Inputs of compose_sequential for tests and benchmarks."""

from __future__ import annotations

import torch

from repkern.ops._sample import Sample

__all__ = ["samples"]

# (Ci, Cm, Co, groups, K1, K2): ones, primes, vector widths and one off them, depthwise, 1x1 on either side.
_CASES = (
    (1, 1, 1, 1, 1, 1),
    (3, 5, 7, 1, 3, 3),
    (3, 16, 17, 1, 5, 3),
    (4, 6, 8, 2, 3, 5),
    (6, 6, 6, 6, 3, 3),
    (5, 9, 4, 1, 1, 3),
    (7, 3, 33, 1, 3, 1),
    (2, 4, 3, 1, 2, 4),
)
_SLOW = ((16, 48, 50, 1, 3, 3), (96, 64, 96, 32, 3, 3))


def samples(op_name: str) -> list[Sample]:
    """Samples for `compose_sequential` or its backward."""
    generator = torch.Generator().manual_seed(11)
    return [_sample(op_name, case, generator, slow=case in _SLOW) for case in _CASES + _SLOW]


def _sample(op_name: str, case: tuple[int, ...], generator: torch.Generator, slow: bool) -> Sample:
    ci, cm, co, g, k1, k2 = case
    size = k1 + k2 - 1

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    name = f"ci{ci}_cm{cm}_co{co}_g{g}_k{k1}_k{k2}"
    first, second = random(cm, ci // g, k1, k1), random(co, cm // g, k2, k2)
    if op_name == "compose_sequential":
        return Sample(name, (first, second, g), (cm // g * min(k1, k2) ** 2,), slow=slow)
    lengths = (co // g * k2 * k2, ci // g * k1 * k1)
    return Sample(name, (random(co, ci // g, size, size), first, second, g), lengths, slow=slow)
