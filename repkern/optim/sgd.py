"""RepSGD: stochastic gradient descent with multiplied gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from repkern.ops import grad_mult_sgd_
from repkern.optim._base import Launch, Mult, RepOptimizer, non_negative

__all__ = ["RepSGD"]


class RepSGD(RepOptimizer):
    """torch.optim.SGD whose gradients are multiplied first: training a CSLA block by SGD (paper 2205.15242, Sec. 3.2).

    g = M * grad, then weight decay (not multiplied), momentum and Nesterov's step as in torch.optim.SGD, whose settings
    these are, per parameter group. All parameters of a device are updated in one launch, with different lr and
    weight_decay too; groups that differ in another setting get one each.
    grad_mults: parameter -> `GradMult`, of which M is s^2 + t^2 at the centre + 1 on its diagonal, or a tensor of the
    parameter's shape, which is M; others are trained as by SGD. State in at least float32: `momentum_buffer`.
    ValueError for settings that cannot be, a parameter in two groups or unknown, and multipliers that do not fit.
    """

    _shared = ("momentum", "dampening", "nesterov", "maximize")
    _power = 2

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        grad_mults: Mapping[Any, Mult] | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, grad_mults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        non_negative("momentum", group["momentum"])
        dampening = group["dampening"]
        if isinstance(dampening, bool) or not isinstance(dampening, int | float):
            raise TypeError(f"dampening must be a number, got {dampening!r}")
        if not math.isfinite(dampening):
            raise ValueError(f"dampening must be finite, got {dampening}")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov needs a momentum and no dampening, got momentum={group['momentum']}, "
                f"dampening={group['dampening']}"
            )

    def _update(self, launch: Launch) -> None:
        buffers, first = None, None
        if launch.settings["momentum"] != 0:
            fresh = [state.get("momentum_buffer") is None for state in launch.states]
            if launch.settings["dampening"] != 0:
                # A first gradient is not dampened; whether it was taken or skipped cannot be seen in the buffer later.
                if launch.found_inf is not None and any(fresh) and bool(launch.found_inf):
                    return
                first = fresh
            for parameter, state, new in zip(launch.params, launch.states, fresh, strict=True):
                if new:
                    wide = torch.promote_types(parameter.dtype, torch.float32)
                    state["momentum_buffer"] = torch.zeros_like(parameter, dtype=wide)
            buffers = [state["momentum_buffer"] for state in launch.states]
        grad_mult_sgd_(
            launch.params,
            launch.grads,
            buffers,
            launch.multipliers,
            lr=launch.lr,
            weight_decay=launch.weight_decay,
            first_step=first,
            grad_scale=launch.grad_scale,
            found_inf=launch.found_inf,
            **launch.settings,
        )
