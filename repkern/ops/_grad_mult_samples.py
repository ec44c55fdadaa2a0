"""Tensors for samples of the optimizer steps, how they look in a dtype, and pieces of the error bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repkern.ops._grad_mult import CENTRE, DENSE, NONE, SCALE, Packed, state_dtype

__all__ = ["ODD", "ONE", "SMALL", "Problem", "Spec", "cast", "gamma", "make_problem", "multiplier_magnitudes"]


class Spec(NamedTuple):
    """One parameter: its shape, multiplier, identity, groups, and whether it is channels_last."""

    shape: tuple[int, ...]
    kind: int = NONE
    identity: float = 0.0
    groups: int = 1
    last: bool = False


ONE = (Spec((1,)),)
SMALL = (Spec((3, 3, 3, 3), CENTRE, 1.0), Spec((5,)))
# Rows shorter and longer than vectors; kernels of one, few and many positions; every kind and order of numbers.
ODD = (
    Spec((3, 5, 3, 3), CENTRE),
    Spec((33, 33, 1, 1), CENTRE, 1.0),
    Spec((6, 3, 3, 3), CENTRE, 1.0, 2, True),
    Spec((7, 1, 3, 3), CENTRE, 1.0, 7),
    Spec((5, 2, 5, 5), SCALE),
    Spec((2, 3), DENSE),
    Spec(()),
    Spec((0,)),
    Spec((3, 17, 2, 2), SCALE),
    Spec((3, 3, 13, 13), CENTRE, 1.0),
    Spec((20, 20, 3, 3), CENTRE, 1.0, 1, True),
    Spec((2, 67, 1, 3), CENTRE),
    Spec((3, 4, 3, 3), DENSE, last=True),
    Spec((37,)),
)


class Problem(NamedTuple):
    """Arguments that every step has, float64."""

    params: list[Tensor]
    grads: list[Tensor]
    packed: Packed
    lr: list[float]
    weight_decay: list[float]


def make_problem(specs: Sequence[Spec], generator: torch.Generator, decay: float) -> Problem:
    """Random tensors; the learning rate and the decay differ from tensor to tensor."""
    packed = Packed([], [], [])
    for spec in specs:
        vectors = {NONE: (), SCALE: (spec.shape[:1],), CENTRE: (spec.shape[:1],) * 2, DENSE: (spec.shape,)}
        packed.tensors.extend(random(shape, generator, spec.last) for shape in vectors[spec.kind])
        packed.layout.extend((spec.kind, spec.groups))
        packed.identity.append(spec.identity)
    params, grads = ([random(s.shape, generator, s.last) for s in specs] for _ in range(2))
    rates = [0.1 / (1 + at) for at in range(len(specs))]
    return Problem(params, grads, packed, rates, [decay * at for at in range(1, len(specs) + 1)])


def random(shape: Sequence[int], generator: torch.Generator, last: bool = False) -> Tensor:
    """Normal numbers in float64."""
    values = torch.randn(tuple(shape), dtype=torch.float64, generator=generator)
    return values.contiguous(memory_format=torch.channels_last) if last and values.dim() == 4 else values


def cast(args: tuple[Any, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
    """Arguments of a torch op as parameters of `dtype` want them, copied; the first two lists are params and grads."""

    def copied(value: Any, to: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            # Steps and the numbers of GradScaler are float32 already.
            kept = value.dtype if value.dtype is torch.float32 else to
            return value.to(device=device, dtype=kept, copy=True)
        return [copied(v, to) for v in value] if isinstance(value, list) else value

    return tuple(copied(value, dtype if at < 2 else state_dtype(dtype)) for at, value in enumerate(args))


def gamma(roundings: int, u: float) -> float:
    """The relative error of that many roundings in a row."""
    return roundings * u / (1 - roundings * u)


def multiplier_magnitudes(packed: Packed) -> Packed:
    """|scale| + |centre| + |identity|, from which M was rounded."""
    return Packed([t.abs() for t in packed.tensors], packed.layout, [abs(i) for i in packed.identity])
