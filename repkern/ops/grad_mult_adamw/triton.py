"""grad_mult_adamw_ on a Triton kernel: fill the table, launch. Shapes were checked before."""

from __future__ import annotations

import torch
from torch import Tensor

from repkern.ops._grad_mult import Packed
from repkern.ops._grad_mult_plan import plan_for
from repkern.ops._grad_mult_tables import in_order
from repkern.ops._grad_mult_triton import launch
from repkern.ops.grad_mult_adamw.triton_kernels import adamw_kernel

__all__ = ["grad_mult_adamw_"]

_NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")


def grad_mult_adamw_(
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
    """The step, as repkern.ops.grad_mult_adamw_ describes it; the steps are counted by a launch of their own."""
    lists = [params, grads, exp_avgs, exp_avg_sqs]
    if amsgrad:
        lists.append(max_exp_avg_sqs)
    all_multipliers = Packed(multipliers, layout, identity)
    plan = plan_for("grad_mult_adamw_", _NAMES[: len(lists)], lists, all_multipliers)
    constants = (-1.0 if maximize else 1.0, beta1, beta2, 1 - beta1, 1 - beta2, eps)
    with in_order(plan, lists, all_multipliers, (0, 2, 3, 4)) as (tensors, packed):
        numbers = (lr, weight_decay, [0] * len(params))
        launch(
            adamw_kernel, plan, tensors, steps, packed, numbers, constants, grad_scale, found_inf,
            AMSGRAD=amsgrad, DECOUPLED=decoupled, MULTIPLY_UPDATE=multiply_update,
        )  # fmt: skip
    one = 1 if found_inf is None else (found_inf.reshape(()) == 0).to(torch.float32)
    torch._foreach_add_(steps, one)
