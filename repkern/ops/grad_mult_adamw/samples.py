"""Inputs of grad_mult_adamw_ for tests and benchmarks; the outputs are the parameters, then every state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repkern.ops import _grad_mult_samples as shared
from repkern.ops._grad_mult import Packed, dense_multipliers
from repkern.ops._sample import Sample

__all__ = ["samples"]

# name: specs, decay, amsgrad, maximize, decoupled, multiply_update, gradient scale, infinity found
_CASES: dict[str, tuple[Any, ...]] = {
    "one": (shared.ONE, 0.0, False, False, True, False, None, None),
    "small": (shared.SMALL, 0.01, True, False, True, True, None, None),
    "decoupled": (shared.ODD, 0.1, False, False, True, False, None, None),
    "coupled": (shared.ODD, 0.01, False, True, False, False, None, 0.0),
    "amsgrad": (shared.ODD, 0.0, True, False, True, False, 3.0, None),
    "released": (shared.ODD, 0.1, True, True, True, True, 3.0, 0.0),
    "infinity": (shared.ODD, 0.1, True, False, True, False, 3.0, 1.0),
}
_BETAS, _EPS = (0.9, 0.99), 1e-6


def samples(op_name: str) -> list[Sample]:
    """Samples of `grad_mult_adamw_`, after 0, 1, 2, ... steps."""
    generator = torch.Generator().manual_seed(6)
    return [_sample(name, case, generator) for name, case in _CASES.items()]


def _sample(name: str, case: tuple[Any, ...], generator: torch.Generator) -> Sample:
    specs, decay, amsgrad, maximize, decoupled, multiply_update, scale, found = case
    problem = shared.make_problem(specs, generator, decay)
    mean, square, largest = ([shared.random(s.shape, generator, s.last) for s in specs] for _ in range(3))
    squares = [[t.square() + 0.01 for t in tensors] for tensors in (square, largest if amsgrad else [])]
    steps = [torch.tensor(float(at)) for at in range(len(specs))]
    flags = [None if value is None else torch.tensor([value], dtype=torch.float32) for value in (scale, found)]
    args = (
        problem.params, problem.grads, mean, *squares, steps, *problem.packed, problem.lr, problem.weight_decay,
        *_BETAS, _EPS, amsgrad, maximize, decoupled, multiply_update, *flags,
    )  # fmt: skip
    return Sample(name, args, (), bounds=_bounds)


def _bounds(args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """The errors carried from line to line of the step, each with the roundings of its own line."""
    params, grads, means, squares, largest, steps, tensors, layout, identity, lr, decay, *numbers = args
    beta1, beta2, eps, amsgrad, maximize, decoupled, multiply_update, scale, _ = numbers
    shapes = [p.shape for p in params]
    exact = dense_multipliers(shapes, Packed(tensors, layout, identity))
    sums = dense_multipliers(shapes, shared.multiplier_magnitudes(Packed(tensors, layout, identity)))
    u = torch.finfo(dtype).eps / 2
    answer: list[list[Tensor]] = [[], [], [], []]
    for at, param in enumerate(params):
        one = torch.ones_like(param)
        m_exact, m_sum = (one if ms[at] is None else ms[at] for ms in (exact, sums))
        unscaled = grads[at] / (1 if scale is None else scale.double().reshape(())) * (-1 if maximize else 1)
        coupled = 0 if decoupled else decay[at]
        g, g_sum = m_exact * unscaled + coupled * param, m_sum * unscaled.abs() + coupled * param.abs()
        mean = means[at] + (1 - beta1) * (g - means[at])
        mean_error = shared.gamma(16, u) * (means[at].abs() + (1 - beta1) * (g_sum + means[at].abs()))
        square = beta2 * squares[at] + (1 - beta2) * g * g
        square_error = shared.gamma(32, u) * (beta2 * squares[at] + (1 - beta2) * g_sum * g_sum)
        used = torch.maximum(square, largest[at]) if amsgrad else square
        taken = float(steps[at]) + 1
        corrected = 1 / (1 - beta2**taken) ** 0.5
        # The corrections are float64 in every dtype: what rounding leaves of 1 - beta^t.
        lost = shared.gamma(64, 2**-53) * (1 / (1 - beta1**taken) + 1 / (1 - beta2**taken))
        root = used.sqrt()
        denominator = root * corrected + eps
        denominator_error = corrected * square_error / root.clamp_min(u) + (shared.gamma(8, u) + lost) * denominator
        rate = lr[at] / (1 - beta1**taken)
        update = rate * (m_exact if multiply_update else one) * mean / denominator
        update_sum = rate * (m_sum if multiply_update else one)
        numerator_error = update_sum * (mean_error + (shared.gamma(8, u) + lost) * (mean.abs() + mean_error))
        assert bool((denominator_error < denominator / 2).all()), "the samples must not divide by what may be 0"
        update_error = (numerator_error + update.abs() * denominator_error) / (denominator - denominator_error)
        answer[0].append(update_error + shared.gamma(6, u) * (param.abs() + update.abs()))
        for bounds, bound in zip(answer[1:], (mean_error, square_error, square_error), strict=True):
            bounds.append(bound)
    return [bound for bounds in answer[: 4 if amsgrad else 3] for bound in bounds]
