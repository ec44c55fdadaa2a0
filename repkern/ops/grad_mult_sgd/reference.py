"""grad_mult_sgd_ in plain torch: the meaning, the oracle and the fallback. Any device and dtype."""

from __future__ import annotations

from torch import Tensor

from repkern.ops._grad_mult import Packed, changed_tensors, dense_multipliers, keep_where, multiplied_gradient
from repkern.ops._overlap import refuse_overlaps

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
    """The step of repkern.ops.grad_mult_sgd_, arguments as in the schema."""
    refuse_overlaps("grad_mult_sgd_", changed_tensors([params, grads, momentum_buffers]))
    dense = dense_multipliers([p.shape for p in params], Packed(multipliers, layout, identity))
    for at, (param, grad) in enumerate(zip(params, grads, strict=True)):
        g = multiplied_gradient(grad, dense[at], grad_scale, maximize)
        value = param.to(g.dtype)
        g = g + weight_decay[at] * value
        if momentum != 0:
            buffer = momentum_buffers[at]
            moved = g if first_step[at] else momentum * buffer + (1 - dampening) * g
            buffer.copy_(keep_where(found_inf, buffer, moved))
            g = g + momentum * moved if nesterov else moved
        param.copy_(keep_where(found_inf, param, value - lr[at] * g))
