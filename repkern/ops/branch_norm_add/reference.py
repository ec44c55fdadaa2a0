"""branch_norm_add in plain torch: the meaning. The math is in docs/ops/branch_norm_add.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from repkern.ops.branch_norm_add.contract import ACTIVATIONS, AS_IS, BATCH, map_format, statistics_dtype

__all__ = [
    "branch_norm_add",
    "branch_norm_add_backward",
    "branch_norm_statistics",
    "branch_norm_statistics_backward",
    "branch_norm_sums",
]

_MAP = (0, 2, 3)  # the dimensions a channel's statistics run over


def _channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def branch_norm_statistics(branches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every branch: two [B, C]."""
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for y in branches:
        wide = y.to(statistics_dtype(y.dtype))
        # Counted from a value of the channel: torch's variance loses what |mean| / std is worth, even in float64.
        origin = wide[:1, :, :1, :1].detach()
        var, mean = torch.var_mean(wide - origin, dim=_MAP, correction=0)
        means.append(mean + origin.view(-1))
        variances.append(var)
    return torch.stack(means), torch.stack(variances)


def branch_norm_statistics_backward(
    grad_mean: Tensor, grad_var: Tensor, branches: Sequence[Tensor], mean: Tensor
) -> list[Tensor]:
    """Gradients of the branches for those of `branch_norm_statistics`' outputs."""
    count = branches[0].numel() // branches[0].shape[1]
    grads: list[Tensor] = []
    for b, y in enumerate(branches):
        centred = y.to(mean.dtype) - _channel(mean[b])
        grad = (_channel(grad_mean[b]) + 2 * centred * _channel(grad_var[b])) / count
        grads.append(_as_map(grad, branches[0]))
    return grads


def branch_norm_add(
    branches: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    modes: Sequence[int],
    eps: Sequence[float],
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [N, C, H, W], mean and biased variance [B0, C] of the branches of mode batch."""
    mean, var = _batch_statistics(branches, modes)
    z = _pre_activation(branches, _terms(weights, biases, means, variances, mean, var, modes, eps))
    return _as_map(_activate(z, activation), branches[0]), mean, var


def branch_norm_sums(
    grad: Tensor,
    branches: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    modes: Sequence[int],
    eps: Sequence[float],
    activation: int,
) -> Tensor:
    """[1 + Bn, C]: the sum of dz, then the sum of dz * xhat of every branch with a norm."""
    terms = _terms(weights, biases, means, variances, mean, var, modes, eps)
    dz = _grad_z(grad, _pre_activation(branches, terms), activation)
    return _sums(dz, [_normalized(y, term) for y, term in zip(branches, terms, strict=True) if term is not None])


def branch_norm_add_backward(
    grad: Tensor,
    branches: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    sums: Tensor | None,
    count: Tensor | None,
    modes: Sequence[int],
    eps: Sequence[float],
    activation: int,
) -> list[Tensor]:
    """Gradients of every branch with a norm, of the others (one tensor, if any), of weights [Bn, C], of biases [C]."""
    if sums is None and torch.is_grad_enabled() and any(y.requires_grad for y in branches):
        mean, var = _batch_statistics(branches, modes)  # a second derivative goes through the statistics as well
    terms = _terms(weights, biases, means, variances, mean, var, modes, eps)
    dz = _grad_z(grad, _pre_activation(branches, terms), activation)
    normalized = [_normalized(y, term) for y, term in zip(branches, terms, strict=True) if term is not None]
    sums = _sums(dz, normalized) if sums is None else sums
    total: Tensor | int = dz.numel() // dz.shape[1] if count is None else count
    grads: list[Tensor] = []
    for mode, term in zip(modes, terms, strict=True):
        if term is None:
            continue
        inner = dz
        if mode == BATCH:
            k = len(grads)
            inner = dz - _channel(sums[0] / total) - normalized[k] * _channel(sums[1 + k] / total)
        grads.append(_as_map(inner * _channel(term[0]), branches[0]))
    if AS_IS in modes:
        grads.append(_as_map(dz, branches[0]))
    params = weights[0].dtype if len(weights) > 0 else sums.dtype
    # One sum may serve as both where nothing is normalized; an op's outputs must not share memory.
    return [*grads, sums[1:].to(params, copy=True), sums[0].to(params, copy=True)]


_Term = tuple[Tensor, Tensor, Tensor, Tensor]  # scale, mean, 1 / std, bias: each [C]


def _terms(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    modes: Sequence[int],
    eps: Sequence[float],
) -> list[_Term | None]:
    norms = zip(weights, biases, eps, strict=True)
    batch, given = zip(mean, var, strict=True), zip(means, variances, strict=True)
    terms: list[_Term | None] = []
    for mode in modes:
        if mode == AS_IS:
            terms.append(None)
            continue
        weight, bias, small = next(norms)
        centre, spread = next(batch if mode == BATCH else given)
        inverse = torch.rsqrt(spread.to(mean.dtype) + small)
        terms.append((weight.to(mean.dtype) * inverse, centre.to(mean.dtype), inverse, bias.to(mean.dtype)))
    return terms


def _batch_statistics(branches: Sequence[Tensor], modes: Sequence[int]) -> tuple[Tensor, Tensor]:
    own = [y for y, mode in zip(branches, modes, strict=True) if mode == BATCH]
    if own:
        return branch_norm_statistics(own)
    shape, dtype = (0, branches[0].shape[1]), statistics_dtype(branches[0].dtype)
    return branches[0].new_empty(shape, dtype=dtype), branches[0].new_empty(shape, dtype=dtype)


def _pre_activation(branches: Sequence[Tensor], terms: Sequence[_Term | None]) -> Tensor:
    wide = statistics_dtype(branches[0].dtype)
    total: Tensor | None = None
    for y, term in zip(branches, terms, strict=True):
        value = y.to(wide)
        if term is not None:
            scale, mean, _, bias = term
            value = (value - _channel(mean)) * _channel(scale) + _channel(bias)
        total = value if total is None else total + value
    assert total is not None
    return total


def _normalized(y: Tensor, term: _Term) -> Tensor:
    _, mean, inverse, _ = term
    return (y.to(mean.dtype) - _channel(mean)) * _channel(inverse)


def _sums(dz: Tensor, normalized: Sequence[Tensor]) -> Tensor:
    return torch.stack([dz.sum(_MAP), *((dz * xhat).sum(_MAP) for xhat in normalized)])


def _activate(z: Tensor, activation: int) -> Tensor:
    name = ACTIVATIONS[activation]
    return z if name == "none" else getattr(functional, name)(z)


def _grad_z(grad: Tensor, z: Tensor, activation: int) -> Tensor:
    """grad * activation'(z), with torch's choice at the corners."""
    grad = grad.to(z.dtype)
    name = ACTIVATIONS[activation]
    if name == "relu":
        return torch.where(z <= 0, 0, grad)
    if name == "relu6":
        return torch.where((z <= 0) | (z >= 6), 0, grad)
    if name == "silu":
        gate = torch.sigmoid(z)
        return grad * gate * (1 + z * (1 - gate))
    if name == "hardswish":
        return torch.where(z <= -3, 0, torch.where(z < 3, grad * (z / 3 + 0.5), grad))
    return grad


def _as_map(values: Tensor, like: Tensor) -> Tensor:
    """In the dtype and layout of the maps, in memory of its own."""
    return values.to(like.dtype, copy=True).contiguous(memory_format=map_format(like))
