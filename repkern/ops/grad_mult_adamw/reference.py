"""grad_mult_adamw_ in plain torch: the meaning, the oracle and the fallback. Any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from repkern.ops._grad_mult import Packed, changed_tensors, dense_multipliers, keep_where, multiplied_gradient
from repkern.ops._overlap import refuse_overlaps

__all__ = ["grad_mult_adamw_"]


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
    """The step of repkern.ops.grad_mult_adamw_, arguments as in the schema."""
    refuse_overlaps("grad_mult_adamw_", changed_tensors([params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs]))
    dense = dense_multipliers([p.shape for p in params], Packed(multipliers, layout, identity))
    for at, (param, grad) in enumerate(zip(params, grads, strict=True)):
        multiplier, step = dense[at], steps[at]
        g = multiplied_gradient(grad, multiplier, grad_scale, maximize)
        value = param.to(g.dtype)
        if decoupled:
            value = value * (1 - lr[at] * weight_decay[at])
        else:
            g = g + weight_decay[at] * value
        mean, square = exp_avgs[at], exp_avg_sqs[at]
        new_mean = mean + (1 - beta1) * (g - mean)
        new_square = beta2 * square + (1 - beta2) * g * g
        mean.copy_(keep_where(found_inf, mean, new_mean))
        square.copy_(keep_where(found_inf, square, new_square))
        if amsgrad:
            largest = max_exp_avg_sqs[at]
            new_square = torch.maximum(largest, new_square)
            largest.copy_(keep_where(found_inf, largest, new_square))
        taken = step.double().reshape(()) + 1
        correction1, correction2 = 1 - beta1**taken, 1 - beta2**taken
        denominator = new_square.sqrt() / correction2.sqrt().to(g.dtype) + eps
        numerator = new_mean if multiplier is None or not multiply_update else multiplier * new_mean
        value = value - (lr[at] / correction1).to(g.dtype) * (numerator / denominator)
        param.copy_(keep_where(found_inf, param, value))
        step.copy_(keep_where(found_inf, step, step + 1))
