"""Sums of normed branches: what a multi-branch block computes in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repkern.nn._affine_norm import AffineNorm, affine_norm, check_normalized
from repkern.nn._norm_state import is_plain, sync_group, untouched, update_running, uses_batch
from repkern.nn.recompute import Recompute, current_tape
from repkern.nn.sync_norm import Known, synced_branch_norm_add, synced_statistics
from repkern.ops import Norm, branch_norm_add, branch_norm_statistics

__all__ = ["RECOMPUTE", "Branch", "branch_norm_sum", "norm_scale_shift"]

#: Values of the blocks' option `recompute`: keep every branch's map for the backward, or make the cheap ones again.
RECOMPUTE = ("none", "cheap")

_ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)
_MOST_BRANCHES = 16
# Without gradients and batch statistics, fewer values than these in all maps take torch's modules less time: a call of
# the op costs 85 us whatever its size, three norms, two sums and a ReLU 32 us (one thread, 2-core AVX-512 machine).
_WORTH_A_CALL = 1 << 18


class Branch(NamedTuple):
    """One term of the sum: norm(make(x)).

    norm: a module over the output channels (BatchNorm2d, SyncBatchNorm, any other) or None for none.
    make: the map before the norm as a function of the block's input; None: the input itself.
    cheap: whether making the map again in the backward costs less than keeping it. `make` must then depend on nothing
    but its argument and parameters (no random numbers), and its norms go through the functions of this module.
    gain: a number [] that multiplies the whole term, with a gradient; None for 1.
    """

    norm: nn.Module | None
    make: Callable[[Tensor], Tensor] | None = None
    cheap: bool = False
    gain: Tensor | None = None


class _Plan(NamedTuple):
    """What the norms of one sum do: which are there, with which statistics, and who shares the batch."""

    norms: list[Norm | None]
    batch: list[nn.Module]  # those with batch statistics
    group: Any
    known: Known | None = None  # the synchronized statistics of a replay


def branch_norm_sum(
    x: Tensor,
    branches: Sequence[Branch],
    activation: nn.Module | None = None,
    *,
    recompute: str = "none",
    owner: nn.Module | None = None,
) -> Tensor:
    """activation(sum over branches of norm(make(x))), with the norms' running statistics updated as torch does.

    x [N, Ci, H, W]; every branch gives [N, Co, H', W'] of one shape and dtype. recompute: one of `RECOMPUTE`; "cheap"
    does not keep the maps of cheap branches for the backward but makes them again, with the same gradients. owner: the
    block, whose parameters these are.
    Norms that are torch's BatchNorm2d or SyncBatchNorm, called as they are, run in one op without a normalized map
    (SyncBatchNorm on the CPU too); any other norm, activation or kind of tensor is called, as in torch.
    """
    if not branches:
        raise ValueError("branch_norm_sum: at least one branch is needed")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    if not _ordinary(x):
        return _by_modules([_map(branch, x) for branch in branches], branches, activation)
    if recompute == "none" or torch.compiler.is_compiling() or not Recompute.possible(x):
        return _normed_sum([_map(branch, x) for branch in branches], branches, activation)
    again = Recompute(owner)
    maps = [again.make(b.make, x) if b.cheap and b.make is not None else _map(b, x) for b in branches]
    with again.dropping():
        return _normed_sum(maps, branches, activation)


def norm_scale_shift(y: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale [C], shift [C]) with which `norm` acts on y [N, C, H, W] now: norm(y) = scale * y + shift.

    In train mode from the batch's statistics (differentiable through y), which also update the running ones; in eval
    mode from the running statistics. For norms whose result is then convolved: scaling the kernel is cheaper than
    writing the normalized map. In at least float32. TypeError for what `affine_norm` does not know.
    """
    affine = affine_norm(norm)
    mean, var = _statistics(y, norm, affine)
    scale = torch.rsqrt(var + affine.eps)
    scale = scale if affine.weight is None else scale * affine.weight.to(scale.dtype)
    shift = -mean * scale
    return scale, shift if affine.bias is None else shift + affine.bias.to(scale.dtype)


def _map(branch: Branch, x: Tensor) -> Tensor:
    return x if branch.make is None else branch.make(x)


def _ordinary(x: Tensor) -> bool:
    """Whether nobody traces or transforms this call, so that an op of our own may stand for torch's modules."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()  # an exported program must not need this package
    return (
        type(x) is Tensor
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def _by_modules(maps: Sequence[Tensor], branches: Sequence[Branch], activation: nn.Module | None) -> Tensor:
    tape = current_tape()
    if tape is not None and any(branch.norm is not None for branch in branches):
        tape.impure = True
    total: Tensor | None = None
    for y, branch in zip(maps, branches, strict=True):
        y = y if branch.norm is None else branch.norm(y)
        y = y if branch.gain is None else y * branch.gain.to(y.dtype)
        total = y if total is None else total + y
    assert total is not None
    return total if activation is None else activation(total)


def _normed_sum(maps: list[Tensor], branches: Sequence[Branch], activation: nn.Module | None) -> Tensor:
    tape = current_tape()
    replaying = tape is not None and tape.replaying
    if not torch.is_grad_enabled() and tape is None and _is_small(maps, branches):
        return _by_modules(maps, branches, activation)
    plan: _Plan | None = tape.next() if tape is not None and replaying else _plan(maps, branches)
    if plan is None:
        return _by_modules(maps, branches, activation)
    code = _ACTIVATIONS.get(type(activation)) if activation is not None and untouched(activation) else None
    fused = code or "none"
    known: Known | None = None
    if plan.group is None:
        out, mean, var = branch_norm_add(maps, plan.norms, fused)
        count: int | Tensor = maps[0].numel() // maps[0].shape[1]
    else:
        out, mean, var, count = synced_branch_norm_add(maps, plan.norms, fused, plan.group, plan.known)
        known = mean, var, count
    if plan.batch and not replaying:
        update_running(plan.batch, mean, var, count)
    if tape is not None and not replaying:
        tape.note(_frozen(plan)._replace(known=known))
    return out if activation is None or code is not None else activation(out)


def _is_small(maps: Sequence[Tensor], branches: Sequence[Branch]) -> bool:
    if maps[0].numel() * len(maps) >= _WORTH_A_CALL or torch.compiler.is_compiling():
        return False
    return not any(branch.norm.training for branch in branches if branch.norm is not None)


def _plan(maps: Sequence[Tensor], branches: Sequence[Branch]) -> _Plan | None:
    """How the op can do these norms; None where torch's modules must (or must raise their errors)."""
    first = maps[0]
    if first.dim() != 4 or first.dtype not in _DTYPES or len(maps) > _MOST_BRANCHES:
        return None
    if any(y.shape != first.shape or y.dtype != first.dtype or y.device != first.device for y in maps[1:]):
        return None
    norms: list[Norm | None] = []
    batch: list[Any] = []
    parameters: list[Tensor] = []
    for branch in branches:
        norm = _norm(branch, first.shape[1])
        norms.append(norm)
        if norm is None:
            if branch.norm is not None or branch.gain is not None:
                return None
            continue
        if norm.mean is None:
            batch.append(branch.norm)
        parameters += [t for t in norm[:4] if t is not None]
    if not _one_dtype(parameters, first) or len(set(batch)) < len(batch):
        return None
    group = sync_group(batch[0]) if batch else None
    if any(sync_group(other) is not group for other in batch[1:]):
        return None
    if group is None and (first.numel() == 0 or (batch and first.numel() == first.shape[1])):
        return None
    return _Plan(norms, batch, group)


def _norm(branch: Branch, channels: int) -> Norm | None:
    """What the op needs of a norm; None without one, and for one that it cannot do."""
    norm: Any = branch.norm
    if norm is None or not is_plain(norm) or norm.num_features != channels:
        return None
    weight, bias, mean = norm.weight, norm.bias, norm.running_mean
    if branch.gain is not None:  # as a factor of the norm's parameters it costs nothing
        if weight is None:
            return None
        gain = branch.gain.to(weight.dtype)
        weight, bias = weight * gain, None if bias is None else bias * gain
    if norm.training or mean is None:
        return Norm(weight, bias, None, None, norm.eps)
    return Norm(weight, bias, mean, norm.running_var, norm.eps)


def _one_dtype(tensors: Sequence[Tensor], like: Tensor) -> bool:
    """Whether what the op reads of the norms is in the maps' dtype, or all in float32 where those are half."""
    if not tensors:
        return True
    dtype, device = tensors[0].dtype, like.device
    if dtype != like.dtype and not (dtype == torch.float32 and like.dtype in _HALF):
        return False
    return all(t.dtype == dtype and t.device == device for t in tensors)


def _frozen(plan: _Plan) -> _Plan:
    """The plan with copies of the running statistics, for a replay after they have moved on."""
    norms = [
        norm
        if norm is None or norm.mean is None or norm.var is None
        else norm._replace(mean=norm.mean.clone(), var=norm.var.clone())
        for norm in plan.norms
    ]
    return plan._replace(norms=norms)


def _statistics(y: Tensor, norm: nn.Module, affine: AffineNorm) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] that `norm` normalizes y with, in at least float32; updates the running ones."""
    tape = current_tape()
    if tape is not None and tape.replaying:
        given, group, earlier = tape.next()
        if given is not None:
            return given
        mean, var = branch_norm_statistics([y]) if group is None else synced_statistics([y], group, earlier)[:2]
        return mean[0], var[0]
    wide = torch.promote_types(y.dtype, torch.float32)
    if affine.mean is not None and affine.var is not None and not (isinstance(norm, _BatchNorm) and uses_batch(norm)):
        given = affine.mean.to(wide), affine.var.to(wide)
        if tape is not None:
            tape.note(((given[0].clone(), given[1].clone()), None, None))
        return given
    group = sync_group(norm)
    if not (_ordinary(y) and is_plain(norm)) or y.dim() != 4 or (group is None and y.numel() <= y.shape[1]):
        return _statistics_by_module(y, norm, wide)
    known: Known | None = None
    count: int | Tensor = y.numel() // y.shape[1]
    if group is None:
        mean, var = branch_norm_statistics([y])
    else:
        mean, var, count = synced_statistics([y], group)
        known = mean.detach(), var.detach(), count
    update_running([norm], mean.detach(), var.detach(), count)
    if tape is not None:
        tape.note((None, group, known))
    return mean[0], var[0]


def _statistics_by_module(y: Tensor, norm: nn.Module, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    tape = current_tape()
    if tape is not None:
        tape.impure = True
    with torch.no_grad():
        normed = norm(y)  # updates the running statistics
    var, mean = torch.var_mean(y.to(wide), dim=(0, 2, 3), unbiased=False)
    if _ordinary(y) and not torch.compiler.is_compiling():
        check_normalized(norm, y, normed, mean, var)
    return mean, var
