"""How far branch_norm_add may be from the exact result: first-order error analysis of docs/ops/branch_norm_add.md.

A normalization is as ill-conditioned as |mean| / std, which no bound on sums of products knows. Every quantity here is
float64 and belongs to one call; `u` is the unit roundoff of the statistics' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repkern.ops.branch_norm_add import reference
from repkern.ops.branch_norm_add.contract import ACTIVATIONS, AS_IS, BATCH, statistics_dtype

__all__ = ["bounds_of"]

_MAP = (0, 2, 3)
# Statistics and sums are added up in chains of at most this many roundings (csrc/branch_norm_add/branch_norm_add.h).
_LONGEST_CHAIN = 1024
# Roundings behind a scale: the root, the quotient, the rounding to S, and those of mean and var to S.
_SCALE_ROUNDINGS = 5
# An activation: exp within 2 units, a sum, a quotient, two products.
_ACTIVATION_ROUNDINGS = 8
# A gradient's element: three products, two differences, the factors' own roundings.
_GRADIENT_ROUNDINGS = 12
# The largest slope of each activation, and of its derivative between corners.
_SLOPE = {"none": 1.0, "relu": 1.0, "relu6": 1.0, "silu": 1.1, "hardswish": 1.5}
_CURVATURE = {"none": 0.0, "relu": 0.0, "relu6": 0.0, "silu": 0.5, "hardswish": 1 / 3}


class _Call(NamedTuple):
    """A call in float64, and the errors of its statistics."""

    maps: list[Tensor]
    terms: list[Any]  # reference terms: scale, mean, 1 / std, bias; None for a map added as it is
    mean_errors: list[Tensor]
    scale_errors: list[Tensor]  # relative
    activation: int
    u: float

    @property
    def slack(self) -> float:
        """Roundings of the chain of fused multiply-adds, the shift among them."""
        return (2 * len(self.maps) + _SCALE_ROUNDINGS) * self.u


def bounds_of(
    op_name: str, args: tuple[Any, ...], dtype: torch.dtype, *, computed_statistics: bool = False
) -> list[Tensor]:
    """Bounds on every output of the op `op_name` called with `args` cast to `dtype`.

    computed_statistics: of a backward, that mean and var come from the forward in `dtype` and are no exact inputs.
    """
    args = tuple(_wide(arg) for arg in args)
    rounding = torch.finfo(dtype).eps / 2
    u = torch.finfo(statistics_dtype(dtype)).eps / 2
    own = rounding if rounding > u else 0.0
    return _backward(args, u, own, computed=True) if computed_statistics else _BOUNDS[op_name](args, u, own)


def _wide(arg: Any) -> Any:
    if isinstance(arg, list | tuple):
        return [_wide(item) for item in arg]
    return arg.double() if isinstance(arg, Tensor) else arg


def _chain(length: int, u: float) -> float:
    n = min(length, _LONGEST_CHAIN)
    return n * u / (1 - n * u)


def _channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def _statistics_errors(y: Tensor, u: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, var and the errors of both: a centred sum of squares misses by the square of what the mean misses by."""
    var, mean = torch.var_mean(y, dim=_MAP, correction=0)
    gamma = _chain(y.numel() // y.shape[1] + _SCALE_ROUNDINGS, u)
    mean_error = gamma * y.abs().mean(_MAP)
    return mean, var, mean_error, gamma * (var + mean_error**2) + mean_error**2


def _statistics(args: tuple[Any, ...], u: float, own: float) -> list[Tensor]:
    errors = [_statistics_errors(y, u) for y in args[0]]
    return [torch.stack([e[2] for e in errors]), torch.stack([e[3] for e in errors])]


def _statistics_backward(args: tuple[Any, ...], u: float, own: float) -> list[Tensor]:
    grad_mean, grad_var, branches, mean = args
    count = branches[0].numel() // branches[0].shape[1]
    answer: list[Tensor] = []
    for b, y in enumerate(branches):
        spread = 2 * (y - _channel(mean[b])).abs() * _channel(grad_var[b].abs())
        answer.append((_GRADIENT_ROUNDINGS * u + own) * (_channel(grad_mean[b].abs()) + spread) / count)
    return answer


def _forward_call(args: tuple[Any, ...], u: float) -> tuple[_Call, list[Tensor], list[Tensor]]:
    branches, weights, biases, means, variances, modes, eps, activation = args
    rows = [_statistics_errors(y, u) for y, mode in zip(branches, modes, strict=True) if mode == BATCH]
    empty = branches[0].new_empty((0, branches[0].shape[1]))
    mean, var, mean_error, var_error = (
        (torch.stack(column) for column in zip(*rows, strict=True)) if rows else (empty,) * 4
    )
    terms = reference._terms(weights, biases, means, variances, mean, var, modes, eps)
    batch, small = iter(range(len(rows))), iter(eps)
    mean_errors: list[Tensor] = []
    scale_errors: list[Tensor] = []
    for y, mode in zip(branches, modes, strict=True):
        zero = y.new_zeros(y.shape[1])
        e = 0.0 if mode == AS_IS else next(small)
        if mode != BATCH:
            mean_errors.append(zero)
            scale_errors.append(zero + _SCALE_ROUNDINGS * u)
            continue
        b = next(batch)
        inside = var[b] + e
        mean_errors.append(mean_error[b])
        worst = torch.rsqrt((inside - var_error[b]).clamp_min(0) / inside) - 1
        scale_errors.append(worst + _SCALE_ROUNDINGS * u)
    return _Call(list(branches), terms, mean_errors, scale_errors, activation, u), list(mean_error), list(var_error)


def _sum_error(call: _Call) -> tuple[Tensor, Tensor]:
    """z and the error of the computed z."""
    z = reference._pre_activation(call.maps, call.terms)
    error, size = torch.zeros_like(z), torch.zeros_like(z)
    for y, term, off, relative in zip(call.maps, call.terms, call.mean_errors, call.scale_errors, strict=True):
        if term is None:
            size += y.abs()
            continue
        scale, mean, _, bias = (_channel(t) for t in term)
        error += scale.abs() * _channel(off) * (1 + _channel(relative))
        error += _channel(relative) * (scale * (y - mean)).abs()
        size += scale.abs() * (y.abs() + mean.abs()) + bias.abs()
    # 0 * inf: no statement where the variance may be all error.
    return z, (error + call.slack * size).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _forward(args: tuple[Any, ...], u: float, own: float) -> list[Tensor]:
    call, mean_errors, var_errors = _forward_call(args, u)
    z, error = _sum_error(call)
    name = ACTIVATIONS[call.activation]
    out = reference._activate(z, call.activation).abs()
    bound = _SLOPE[name] * error + _ACTIVATION_ROUNDINGS * u * out
    empty = z.new_empty((0, z.shape[1]))
    rows = [torch.stack(errors) if errors else empty for errors in (mean_errors, var_errors)]
    return [bound + own * (out + bound), *rows]


class _Backward(NamedTuple):
    """What the gradients and the sums are made of, each with the error of its computed value."""

    call: _Call
    dz: Tensor
    dz_error: Tensor
    normalized: list[Tensor]
    normalized_errors: list[Tensor]
    sums: Tensor
    sum_errors: Tensor


def _exact_call(tensors: Sequence[Any], options: Sequence[Any], u: float) -> _Call:
    """A call whose statistics are inputs."""
    branches, weights, biases, means, variances, mean, var = tensors
    modes, eps, activation = options
    terms = reference._terms(weights, biases, means, variances, mean, var, modes, eps)
    zero = mean.new_zeros(branches[0].shape[1])
    exact = [zero] * len(branches), [zero + _SCALE_ROUNDINGS * u] * len(branches)
    return _Call(list(branches), terms, *exact, activation, u)


def _backward_parts(grad: Tensor, call: _Call) -> _Backward:
    activation, u, terms = call.activation, call.u, call.terms
    z, error = _sum_error(call)
    dz = reference._grad_z(grad, z, activation)
    ends = [reference._grad_z(grad, z + way * error, activation) for way in (-1, 1)]
    # A corner within reach of the error may be seen from its other side.
    jump = torch.maximum(*((end - dz).abs() for end in ends))
    dz_error = jump + 2 * _CURVATURE[ACTIVATIONS[activation]] * error * grad.abs()
    dz_error = dz_error + _ACTIVATION_ROUNDINGS * u * dz.abs()
    if ACTIVATIONS[activation] in ("silu", "hardswish"):
        dz_error = dz_error + _ACTIVATION_ROUNDINGS * u * grad.abs() * (1 + z.abs())
    normalized = [reference._normalized(y, term) for y, term in zip(call.maps, terms, strict=True) if term is not None]
    normalized_errors = [
        _channel(off * term[2]) + _channel(relative) * reference._normalized(y, term).abs()
        for y, term, off, relative in zip(call.maps, terms, call.mean_errors, call.scale_errors, strict=True)
        if term is not None
    ]
    gamma = _chain(dz.numel() // dz.shape[1] + _GRADIENT_ROUNDINGS, u)
    factors = [torch.ones_like(dz), *(xhat.abs() for xhat in normalized)]
    factor_errors = [torch.zeros_like(dz), *normalized_errors]
    rows = [
        ((gamma * dz.abs() + dz_error) * f + (dz.abs() + dz_error) * e).sum(_MAP)
        for f, e in zip(factors, factor_errors, strict=True)
    ]
    return _Backward(
        call, dz, dz_error, normalized, normalized_errors, reference._sums(dz, normalized), torch.stack(rows)
    )


def _sums(args: tuple[Any, ...], u: float, own: float) -> list[Tensor]:
    return [_backward_parts(args[0], _exact_call(args[1:8], args[8:], u)).sum_errors]


def _backward(args: tuple[Any, ...], u: float, own: float, *, computed: bool = False) -> list[Tensor]:
    sums, count = args[8:10]
    modes = args[10]
    call = _forward_call((*args[1:6], *args[10:]), u)[0] if computed else _exact_call(args[1:8], args[10:], u)
    parts = _backward_parts(args[0], call)
    total = parts.dz.numel() // parts.dz.shape[1] if count is None else float(count)
    if sums is not None:
        parts = parts._replace(sums=sums, sum_errors=torch.zeros_like(sums))
    means, mean_errors = parts.sums.abs() / total, parts.sum_errors / total
    small = _GRADIENT_ROUNDINGS * u + own
    answer: list[Tensor] = []
    norms = zip(modes, call.terms, call.scale_errors, strict=True)
    for k, (mode, term, relative) in enumerate(norm for norm in norms if norm[1] is not None):
        scale, xhat = _channel(term[0].abs()), parts.normalized[k].abs()
        size, error = parts.dz.abs(), parts.dz_error
        if mode == BATCH:
            size = size + _channel(means[0]) + xhat * _channel(means[1 + k])
            error = error + _channel(mean_errors[0]) + xhat * _channel(mean_errors[1 + k])
            error = error + parts.normalized_errors[k] * _channel(means[1 + k] + mean_errors[1 + k])
        answer.append(scale * (error + (small + _channel(relative)) * (size + error)))
    if AS_IS in modes:
        answer.append(parts.dz_error + small * (parts.dz.abs() + parts.dz_error))
    rows = parts.sum_errors + own * (parts.sums.abs() + parts.sum_errors)
    return [*answer, rows[1:], rows[0]]


_BOUNDS = {
    "branch_norm_add": _forward,
    "branch_norm_add_backward": _backward,
    "branch_norm_statistics": _statistics,
    "branch_norm_statistics_backward": _statistics_backward,
    "branch_norm_sums": _sums,
}
