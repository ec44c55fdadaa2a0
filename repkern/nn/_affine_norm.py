"""Norms that are one scale and one shift per channel: torch's BatchNorms, and frozen norms of any class."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repkern.nn._norm_state import SyncBatchNorm, uses_batch
from repkern.nn._surgery import copied_model
from repkern.nn._weight_hooks import current_bias, current_weight

__all__ = ["AffineNorm", "affine_norm", "check_normalized", "is_torchs"]

# Frozen norms are often written with the number in their forward.
_USUAL_EPS = 1e-5
# Relative to the largest result, in float64: 1e-5 of another eps, or an activation, gives more.
_SAME = 1e-9
# In units of the dtype, for a normed map of a batch.
_ROUNDING = 4096
_BATCH = (True, 0)
_known: WeakKeyDictionary[nn.Module, dict[tuple[bool, int], float]] = WeakKeyDictionary()


class AffineNorm(NamedTuple):
    """(y - mean) / sqrt(var + eps) * weight + bias, tensors [C]; weight and bias None for 1 and 0.

    mean and var are None in a norm that keeps no running statistics.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float


def is_torchs(norm: nn.Module) -> bool:
    """Whether this is a BatchNorm with torch's own forward."""
    own = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
    return isinstance(norm, _BatchNorm) and type(norm).forward in own and "forward" not in vars(norm)


def affine_norm(norm: nn.Module) -> AffineNorm:
    """What `norm` does with its running statistics, weight and bias as its next forward uses them (with gradient).

    Known are torch's BatchNorms, and modules with running_mean, running_var, weight and bias [C] (attribute eps, or a
    number in the code) that compute the same: a copy is called once to see that. TypeError for all others.
    """
    own: Any = norm
    # With a batch's statistics a subclass is judged by the call that it gets anyway, see `check_normalized`.
    if is_torchs(norm) or (isinstance(norm, _BatchNorm) and uses_batch(norm)):
        return AffineNorm(current_weight(norm), current_bias(norm), own.running_mean, own.running_var, own.eps)
    tensors = [getattr(norm, name, None) for name in ("running_mean", "running_var", "weight", "bias")]
    mean, var, weight, bias = tensors
    channels = mean.numel() if isinstance(mean, Tensor) else 0
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise TypeError(f"a norm over channels with running_mean and running_var is needed, got {type(norm).__name__}")
    for name, tensor in zip(("running_var", "weight", "bias"), tensors[1:], strict=True):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.numel() != channels):
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor
            raise TypeError(f"{type(norm).__name__}.{name} must be a tensor [{channels}] or None, got {shape}")
    weight = None if weight is None else current_weight(norm).flatten()
    bias = None if bias is None else current_bias(norm)
    affine = AffineNorm(weight, None if bias is None else bias.flatten(), mean.flatten(), var.flatten(), _USUAL_EPS)
    return affine._replace(eps=_eps(norm, affine))


@torch.no_grad()
def check_normalized(norm: nn.Module, y: Tensor, got: Tensor, mean: Tensor, var: Tensor) -> None:
    """TypeError where `got`, which a subclass of BatchNorm made of y [N, C, H, W], is not y normalized by mean, var."""
    if is_torchs(norm) or _known.get(norm, {}).get(_BATCH) is not None:
        return
    if got.shape == y.shape:
        own: Any = norm
        weight, bias = current_weight(norm), current_bias(norm)
        wanted = nn.functional.batch_norm(
            y.double(), mean.double(), var.double(), _double(weight), _double(bias), eps=own.eps
        )
        unit = max(torch.finfo(got.dtype).eps, torch.finfo(mean.dtype).eps)
        if float((got.double() - wanted).abs().max()) <= _ROUNDING * unit * (1 + float(wanted.abs().max())):
            _known.setdefault(norm, {})[_BATCH] = own.eps
            return
    raise TypeError(
        f"{type(norm).__name__} does not compute what nn.BatchNorm2d does, so it is not one scale and shift per channel"
    )


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def _eps(norm: nn.Module, affine: AffineNorm) -> float:
    """The norm's eps. TypeError where it computes something else than such a norm with any eps."""
    given = getattr(norm, "eps", None)
    eps = float(given) if isinstance(given, int | float) else _USUAL_EPS
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return eps  # a module is judged where it is called as it is
    known = _known.setdefault(norm, {})
    key = (norm.training, hash(eps))
    if key not in known:
        known[key] = _measured_eps(norm, affine, eps)
    return known[key]


@torch.no_grad()
def _measured_eps(norm: nn.Module, affine: AffineNorm, eps: float) -> float:
    weight, bias, mean, var = (None if t is None else t.detach().cpu().double() for t in affine[:4])
    assert mean is not None
    assert var is not None
    if not all(bool(t.isfinite().all()) for t in (weight, bias, mean, var) if t is not None):
        return eps
    steps = torch.tensor([-2.0, 0.0, 0.5, 3.0], dtype=torch.float64)[:, None]
    probe = mean + steps * (var.abs() + 1).sqrt()
    try:
        twin: Any = copied_model(norm).to("cpu", torch.float64)
        if isinstance(norm, _BatchNorm):
            twin.eval()
        got = twin(probe[:, :, None, None].clone())[:, :, 0, 0].double()
    except Exception as problem:  # a stranger's code
        raise TypeError(f"{type(norm).__name__} cannot be called on a map [N, C, H, W]: {problem}") from problem
    for candidate in (eps, 1e-5, 1e-6, 1e-4, 1e-3, 1e-12, 0.0):
        wanted = (probe - mean) * torch.rsqrt(var + candidate)
        wanted = wanted if weight is None else wanted * weight
        wanted = wanted if bias is None else wanted + bias
        if got.shape == wanted.shape and float((got - wanted).abs().max()) <= _SAME * float(wanted.abs().max()):
            return candidate
    raise TypeError(
        f"{type(norm).__name__} does not compute (x - running_mean) / sqrt(running_var + eps) * weight + bias with "
        f"eps={eps:g}, so it is not one scale and shift per channel"
    )
