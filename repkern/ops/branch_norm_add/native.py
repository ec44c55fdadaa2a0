"""branch_norm_add on the native kernels: allocate, collect addresses, call. Shapes were checked before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._check import DTYPE_CODE
from repkern.ops._library import Native
from repkern.ops.branch_norm_add.contract import AS_IS, BATCH, NormPlan, map_format, statistics_dtype

__all__ = [
    "branch_norm_add",
    "branch_norm_add_backward",
    "branch_norm_statistics",
    "branch_norm_statistics_backward",
    "branch_norm_sums",
]


def branch_norm_add(
    native: Native,
    plan: NormPlan,
    branches: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    modes: Sequence[int],
    eps: Sequence[float],
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out like a branch, mean and biased variance [B0, C] of the branches of mode batch."""
    call = _Call(branches, activation, plan.param_dtype)
    shape = (plan.batch_norms, branches[0].shape[1])
    mean = _check.empty(shape, plan.statistics_dtype, call.device)
    var = _check.empty(shape, plan.statistics_dtype, call.device)
    call.add_norms(plan, weights, biases, means, variances, mean, var, eps)
    out = call.new_map()
    call.run(native, "branch_norm_add_forward", out.data_ptr())
    return out, mean, var


def branch_norm_add_backward(
    native: Native,
    plan: NormPlan,
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
    call = _Call(branches, activation, plan.param_dtype)
    mean, var, grad = mean.contiguous(), var.contiguous(), call.as_map(grad)
    grads = [call.new_map() for mode in modes if mode != AS_IS]
    call.add_norms(plan, weights, biases, means, variances, mean, var, eps, grads)
    channels = branches[0].shape[1]
    weight = _check.empty((len(grads), channels), plan.param_dtype, call.device)
    bias = _check.empty((channels,), plan.param_dtype, call.device)
    as_is = [call.new_map()] if AS_IS in modes else []
    sums = None if sums is None else sums.contiguous()
    # The fields of csrc/branch_norm_add/branch_norm_add.h's NormGrads, in its order.
    given = [grad.data_ptr(), _check.pointer(sums), _check.pointer(count)]
    written = [as_is[0].data_ptr() if as_is else 0, weight.data_ptr(), bias.data_ptr()]
    call.run(native, "branch_norm_add_backward", given + written)
    return [*grads, *as_is, weight, bias]


def branch_norm_sums(
    native: Native,
    plan: NormPlan,
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
    call = _Call(branches, activation, plan.param_dtype)
    mean, var, grad = mean.contiguous(), var.contiguous(), call.as_map(grad)
    call.add_norms(plan, weights, biases, means, variances, mean, var, eps)
    sums = _check.empty((1 + plan.norms, branches[0].shape[1]), plan.statistics_dtype, call.device)
    call.run(native, "branch_norm_sums", grad.data_ptr(), sums.data_ptr())
    return sums


def branch_norm_statistics(native: Native, plan: None, branches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every branch: two [B, C]."""
    wide = statistics_dtype(branches[0].dtype)
    call = _Call(branches, 0, wide)
    shape = (len(branches), branches[0].shape[1])
    mean, var = (_check.empty(shape, wide, call.device) for _ in range(2))
    call.add_statistics(mean, var)
    call.run(native, "branch_norm_statistics")
    return mean, var


def branch_norm_statistics_backward(
    native: Native, plan: None, grad_mean: Tensor, grad_var: Tensor, branches: Sequence[Tensor], mean: Tensor
) -> list[Tensor]:
    """Gradients of the branches for those of `branch_norm_statistics`' outputs."""
    call = _Call(branches, 0, mean.dtype)
    grad_mean, grad_var, mean = grad_mean.contiguous(), grad_var.contiguous(), mean.contiguous()
    grads = [call.new_map() for _ in branches]
    call.add_statistics(mean, mean, grads)
    call.run(native, "branch_norm_statistics_backward", grad_mean.data_ptr(), grad_var.data_ptr(), workspace=False)
    return grads


class _Call:
    """The fields of csrc/branch_norm_add/branch_norm_add.h's NormParams in its order, and what keeps them alive."""

    def __init__(self, branches: Sequence[Tensor], activation: int, param_dtype: torch.dtype) -> None:
        first = branches[0]
        self.device = first.device
        self._format = map_format(first)
        self._maps = [self.as_map(y) for y in branches]
        n, c, h, w = first.shape
        self._fields = [n, c, h * w, int(self._format is torch.channels_last), activation]
        self._fields += [DTYPE_CODE[first.dtype], DTYPE_CODE[param_dtype]]
        self._eps: list[float] = []
        self._alive: list[Tensor] = []

    def as_map(self, values: Tensor) -> Tensor:
        """In the layout of the call; the same tensor where it has it."""
        return values.contiguous(memory_format=self._format)

    def new_map(self) -> Tensor:
        """Memory for a map."""
        first = self._maps[0]
        if self._format is torch.contiguous_format:
            return _check.empty_like(first)
        return _check.empty(first.shape, first.dtype, self.device, self._format)

    def add_norms(
        self,
        plan: NormPlan,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        mean: Tensor,
        var: Tensor,
        eps: Sequence[float],
        grads: Sequence[Tensor] = (),
    ) -> None:
        """Every branch with its parameters and statistics."""
        weights, biases = [t.contiguous() for t in weights], [t.contiguous() for t in biases]
        means, variances = [t.contiguous() for t in means], [t.contiguous() for t in variances]
        self._alive += [*weights, *biases, *means, *variances]
        row = mean.shape[1] * mean.element_size()
        mean_at, var_at = mean.data_ptr(), var.data_ptr()
        for b, (y, mode) in enumerate(zip(self._maps, plan.modes, strict=True)):
            if mode == AS_IS:
                self._fields += (mode, y.data_ptr(), 0, 0, 0, 0, 0)
                self._eps.append(0.0)
                continue
            k = plan.norm_slots[b]
            if mode == BATCH:
                offset = plan.batch_slots[b] * row
                statistics = (mean_at + offset, var_at + offset)
            else:
                slot = plan.given_slots[b]
                statistics = (means[slot].data_ptr(), variances[slot].data_ptr())
            parameters = (weights[k].data_ptr(), biases[k].data_ptr())
            gradient = grads[k].data_ptr() if grads else 0
            self._fields += (mode, y.data_ptr(), *parameters, *statistics, gradient)
            self._eps.append(eps[k])

    def add_statistics(self, mean: Tensor, var: Tensor, grads: Sequence[Tensor] = ()) -> None:
        """Every branch with its rows of mean and var only."""
        row = mean.shape[1] * mean.element_size()
        for b, y in enumerate(self._maps):
            gradient = grads[b].data_ptr() if grads else 0
            self._fields += (BATCH, y.data_ptr(), 0, 0, mean.data_ptr() + b * row, var.data_ptr() + b * row, gradient)
            self._eps.append(0.0)

    def run(self, native: Native, name: str, *arguments: Any, workspace: bool = True) -> None:
        """Call the kernel with the workspace it asks for and its threads or its stream."""
        where = torch.get_num_threads() if native.suffix == "cpu" else native.stream(self.device)
        space: list[int] = []
        if workspace:
            threads = (where,) if native.suffix == "cpu" else ()
            size = native.workspace_size(name)(self._fields, self._eps, *threads)
            self._alive.append(_check.workspace(size, self.device))
            space.append(self._alive[-1].data_ptr())
        native.function(name)(self._fields, self._eps, *arguments, *space, where)
