"""Inputs of grad_mult_sgd_ for tests and benchmarks; the outputs are the parameters, then the momentum buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repkern.ops import _grad_mult_samples as shared
from repkern.ops._grad_mult import Packed
from repkern.ops._sample import Sample
from repkern.ops.grad_mult_sgd import reference

__all__ = ["samples"]

# Casts of the hyper-parameters included: 8 roundings make g, 5 more the buffer, 6 more the parameter.
_ROUNDINGS = 20
# name: specs, decay, momentum, dampening, nesterov, maximize, first step, gradient scale, infinity found
_CASES: dict[str, tuple[Any, ...]] = {
    "one": (shared.ONE, 0.0, 0.0, 0.0, False, False, False, None, None),
    "small": (shared.SMALL, 0.01, 0.9, 0.0, False, False, False, None, None),
    "plain": (shared.ODD, 0.02, 0.0, 0.0, False, False, False, None, None),
    "momentum": (shared.ODD, 0.0, 0.9, 0.0, False, False, False, None, None),
    "nesterov": (shared.ODD, 0.01, 0.8, 0.0, True, True, False, None, None),
    "dampening": (shared.ODD, 0.01, 0.9, 0.3, False, False, False, 3.0, 0.0),
    "first": (shared.ODD, 0.01, 0.9, 0.3, False, True, True, None, None),
    "first_nesterov": (shared.ODD, 0.01, 0.9, 0.0, True, False, True, 3.0, None),
    "infinity": (shared.ODD, 0.01, 0.9, 0.0, False, False, False, 3.0, 1.0),
}


def samples(op_name: str) -> list[Sample]:
    """Samples of `grad_mult_sgd_`; where it is a first step, the buffers hold NaN."""
    generator = torch.Generator().manual_seed(5)
    return [_sample(name, case, generator) for name, case in _CASES.items()]


def _sample(name: str, case: tuple[Any, ...], generator: torch.Generator) -> Sample:
    specs, decay, momentum, dampening, nesterov, maximize, first, scale, found = case
    problem = shared.make_problem(specs, generator, decay)
    buffers = [shared.random(s.shape, generator, s.last) for s in specs] if momentum else []
    if first:
        buffers = [torch.full_like(b, torch.nan) for b in buffers]
    flags = [None if value is None else torch.tensor([value], dtype=torch.float32) for value in (scale, found)]
    args = (
        problem.params, problem.grads, buffers, *problem.packed, problem.lr, problem.weight_decay,
        [int(first)] * len(specs), momentum, dampening, nesterov, maximize, *flags,
    )  # fmt: skip
    return Sample(name, args, (), bounds=_bounds)


def _bounds(args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """Every result is a sum of products: gamma times the same step on absolute values, whose terms all add up."""
    params, grads, buffers, tensors, layout, identity, lr, decay, first, momentum, dampening, *rest = args
    nesterov, _, scale, found = rest
    magnitudes = [[t.abs().clone() for t in tensors] for tensors in (params, grads, buffers)]
    packed = shared.multiplier_magnitudes(Packed(tensors, layout, identity))
    backwards = [-rate for rate in lr]
    reference.grad_mult_sgd_(
        magnitudes[0],
        magnitudes[1],
        magnitudes[2],
        *packed,
        backwards,
        decay,
        first,
        momentum,
        dampening,
        nesterov,
        False,
        scale,
        found,
    )
    factor = shared.gamma(_ROUNDINGS, torch.finfo(dtype).eps / 2)
    return [factor * t for t in magnitudes[0] + magnitudes[2]]
