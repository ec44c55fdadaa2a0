"""Batch statistics over the processes of a group: what SyncBatchNorm adds to a sum of normed branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from repkern.ops import Norm, branch_norm_add, branch_norm_add_backward, branch_norm_statistics, branch_norm_sums

__all__ = ["Known", "synced_branch_norm_add", "synced_statistics"]

#: Mean and biased variance [B, C] over the group, and its values per channel [1].
Known = tuple[Tensor, Tensor, Tensor]


def synced_branch_norm_add(
    maps: Sequence[Tensor], norms: Sequence[Norm | None], activation: str, group: Any, known: Known | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`repkern.ops.branch_norm_add` with the batch's statistics taken over all processes of `group`.

    Processes may have batches of different sizes, empty ones included. Returns the output, and the statistics [B0, C]
    with the group's values per channel [1]; `known` gives those of an earlier, equal call, which then communicates
    only in its backward. Gradients of weights and biases are this process's, as torch's are.
    """
    parameters = [t for norm in norms if norm is not None for t in (norm.weight, norm.bias)]
    return _SyncedSum.apply(norms, activation, group, known, len(maps), *maps, *parameters)


def synced_statistics(maps: Sequence[Tensor], group: Any, known: Known | None = None) -> Known:
    """Mean and biased variance [B, C] of the maps over all processes of `group`, and its count [1]. Differentiable."""
    return _SyncedStatistics.apply(*_local_statistics(maps), _count(maps), group, known)


def _count(maps: Sequence[Tensor]) -> int:
    return maps[0].numel() // maps[0].shape[1]


def _local_statistics(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of this process's part, which unlike a whole batch may have one value a channel, or none."""
    if _count(maps) > 1:
        return branch_norm_statistics(maps)
    mean = torch.stack([y.to(torch.promote_types(y.dtype, torch.float32)).sum((0, 2, 3)) for y in maps])
    return mean, torch.zeros_like(mean)


def _gather(mean: Tensor, var: Tensor, count: int, group: Any) -> Known:
    """Parallel variance (Chan et al. 1979): exact for uneven counts, and no difference of large squares."""
    own = torch.cat([mean.flatten(), var.flatten(), mean.new_full((1,), count)])
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, own, group=group)
    table = torch.stack(parts).double()
    means, variances = (t.view(-1, *mean.shape) for t in table[:, :-1].tensor_split(2, dim=1))
    total = table[:, -1].sum()
    share = (table[:, -1] / total).view(-1, 1, 1)
    centre = (share * means).sum(0)
    spread = (share * (variances + (means - centre).square())).sum(0)
    return centre.to(mean.dtype), spread.to(mean.dtype), total.to(mean.dtype).view(1)


def _add_up(tensor: Tensor, group: Any) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total


class _SyncedStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, count: int, group: Any, known: Known | None) -> Known:
        every_mean, every_var, total = _gather(mean, var, count, group) if known is None else known
        every_mean, every_var = every_mean.clone(), every_var.clone()
        ctx.mark_non_differentiable(total)
        ctx.save_for_backward(mean, every_mean, total)
        ctx.count, ctx.group = count, group
        return every_mean, every_var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Any) -> tuple[Any, ...]:
        mean, every_mean, total = ctx.saved_tensors
        of_mean, of_var = _add_up(torch.stack([grad_mean, grad_var]), ctx.group).unbind(0)
        share = ctx.count / total
        # The variance's dependence on the mean of the group sums to zero.
        return share * (of_mean + 2 * (mean - every_mean) * of_var), share * of_var, None, None, None


class _SyncedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        norms: Sequence[Norm | None],
        activation: str,
        group: Any,
        known: Known | None,
        count_maps: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        maps: Any = tensors[:count_maps]
        of_batch = [y for y, norm in zip(maps, norms, strict=True) if norm is not None and norm.mean is None]
        if known is None:
            known = _gather(*_local_statistics(of_batch), _count(maps), group)
        mean, var, total = (t.clone() for t in known)
        ctx.mark_non_differentiable(mean, var, total)
        ctx.save_for_backward(*tensors, mean, var, total)
        ctx.statistics = [None if n is None else (n.mean, n.var, n.eps) for n in norms]
        ctx.activation, ctx.group, ctx.count_maps = activation, group, count_maps
        if maps[0].numel() == 0:
            return maps[0].clone(), mean, var, total
        out, _, _ = branch_norm_add(maps, _given(norms, mean, var), activation)
        return out, mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        *tensors, mean, var, total = ctx.saved_tensors
        maps, parameters = tensors[: ctx.count_maps], iter(tensors[ctx.count_maps :])
        norms = [None if kept is None else Norm(next(parameters), next(parameters), *kept) for kept in ctx.statistics]
        if grad.numel() == 0:
            sums = mean.new_zeros(1 + sum(norm is not None for norm in norms), mean.shape[1])
        else:
            sums = branch_norm_sums(grad, maps, _given(norms, mean, var), mean[:0], var[:0], ctx.activation)
        grads = _grads_of_maps(grad, maps, norms, mean, var, ctx.activation, _add_up(sums, ctx.group), total)
        present = [norm for norm in norms if norm is not None]
        of_parameters: list[Tensor | None] = []
        for norm, of_weight in zip(present, sums[1:], strict=True):
            of_parameters.append(None if norm.weight is None else of_weight.to(norm.weight.dtype))
            of_parameters.append(None if norm.bias is None else sums[0].to(norm.bias.dtype))
        return (*(None,) * 5, *grads, *of_parameters)


def _given(norms: Sequence[Norm | None], mean: Tensor, var: Tensor) -> list[Norm | None]:
    """The norms with batch statistics turned into norms with these given ones."""
    rows = iter(zip(mean, var, strict=True))
    given: list[Norm | None] = []
    for norm in norms:
        if norm is not None and norm.mean is None:
            centre, spread = next(rows)
            dtype = centre.dtype if norm.weight is None else norm.weight.dtype
            norm = norm._replace(mean=centre.to(dtype), var=spread.to(dtype))
        given.append(norm)
    return given


def _grads_of_maps(
    grad: Tensor,
    maps: Sequence[Tensor],
    norms: Sequence[Norm | None],
    mean: Tensor,
    var: Tensor,
    activation: str,
    sums: Tensor,
    count: Tensor,
) -> list[Tensor]:
    if grad.numel() == 0:
        return [torch.zeros_like(y) for y in maps]
    alone = _count(maps) == 1  # which the op refuses as a batch; two of the same value give the same gradients
    if alone:
        grad, maps = torch.cat([grad, grad]), [torch.cat([y, y]) for y in maps]
    grads, _, _ = branch_norm_add_backward(grad, maps, norms, mean, var, activation, sums=sums, count=count)
    return [g[:1] for g in grads] if alone else grads
