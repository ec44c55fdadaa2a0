"""grad_mult_adamw_ on the native kernels: fill the table, call. Shapes were checked before."""

from __future__ import annotations

from torch import Tensor

from repkern.ops._grad_mult import Packed
from repkern.ops._grad_mult_plan import Plan
from repkern.ops._grad_mult_tables import in_order, launches
from repkern.ops._library import Native

__all__ = ["grad_mult_adamw_"]


def grad_mult_adamw_(
    native: Native,
    plan: Plan,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    multipliers: list[Tensor],
    layout: list[int],
    identity: list[float],
    lr: list[float],
    weight_decay: list[float],
    beta1: float,
    beta2: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    multiply_update: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The step, as repkern.ops.grad_mult_adamw_ describes it."""
    lists = [params, grads, exp_avgs, exp_avg_sqs]
    if amsgrad:
        lists.append(max_exp_avg_sqs)
    flags = [int(amsgrad), int(maximize), int(decoupled), int(multiply_update)]
    function = native.function("grad_mult_adamw")
    with in_order(plan, lists, Packed(multipliers, layout, identity), (0, 2, 3, 4)) as (tensors, packed):
        numbers = (lr, weight_decay, [0] * len(params))
        for fields, where in launches(
            native, plan, tensors, steps, packed, numbers, grad_scale, found_inf, counts_steps=True
        ):
            function(fields, beta1, beta2, eps, flags, *where)
