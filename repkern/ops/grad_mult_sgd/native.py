"""grad_mult_sgd_ on the native kernels: fill the table, call. Shapes were checked before."""

from __future__ import annotations

from torch import Tensor

from repkern.ops._grad_mult import Packed
from repkern.ops._grad_mult_plan import Plan
from repkern.ops._grad_mult_tables import in_order, launches
from repkern.ops._library import Native

__all__ = ["grad_mult_sgd_"]


def grad_mult_sgd_(
    native: Native,
    plan: Plan,
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    multipliers: list[Tensor],
    layout: list[int],
    identity: list[float],
    lr: list[float],
    weight_decay: list[float],
    first_step: list[int],
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The step, as repkern.ops.grad_mult_sgd_ describes it."""
    lists = [params, grads, momentum_buffers] if momentum != 0 else [params, grads]
    function = native.function("grad_mult_sgd")
    with in_order(plan, lists, Packed(multipliers, layout, identity), (0, 2)) as (tensors, packed):
        numbers = (lr, weight_decay, first_step)
        for fields, where in launches(native, plan, tensors, (), packed, numbers, grad_scale, found_inf):
            function(fields, momentum, dampening, nesterov, maximize, *where)
