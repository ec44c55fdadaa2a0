"""grad_mult_sgd_ on a Triton kernel: fill the table, launch. Shapes were checked before."""

from __future__ import annotations

from torch import Tensor

from repkern.ops._grad_mult import Packed
from repkern.ops._grad_mult_plan import plan_for
from repkern.ops._grad_mult_tables import in_order
from repkern.ops._grad_mult_triton import launch
from repkern.ops.grad_mult_sgd.triton_kernels import sgd_kernel

__all__ = ["grad_mult_sgd_"]


def grad_mult_sgd_(
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
    all_multipliers = Packed(multipliers, layout, identity)
    plan = plan_for("grad_mult_sgd_", ("params", "grads", "momentum_buffers")[: len(lists)], lists, all_multipliers)
    constants = (-1.0 if maximize else 1.0, momentum, 1 - dampening)
    with in_order(plan, lists, all_multipliers, (0, 2)) as (tensors, packed):
        numbers = (lr, weight_decay, first_step)
        launch(
            sgd_kernel, plan, tensors, (), packed, numbers, constants, grad_scale, found_inf,
            MOVES=momentum != 0, NESTEROV=nesterov,
        )  # fmt: skip
