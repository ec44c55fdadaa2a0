"""RepAdamW: AdamW with multiplied updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from repkern.ops import grad_mult_adamw_
from repkern.optim._base import Launch, Mult, RepOptimizer, non_negative

__all__ = ["RepAdamW"]


class RepAdamW(RepOptimizer):
    """torch.optim.AdamW whose updates are multiplied: training a CSLA block by AdamW (paper 2205.15242), up to eps.

    Adam's update does not see a constant factor of the gradient but its sign, so the sum of branches with scales s_k
    moves by sum |s_k| times what one kernel would: M = |s| + |t| at the centre + 1 on its diagonal. Settings as in
    torch.optim.AdamW, per parameter group; all parameters of a device are updated in one launch, with different lr and
    weight_decay too.
    grad_mults: parameter -> `GradMult`, or a tensor of the parameter's shape, which is M; others are trained as by
    AdamW. released: M = s + t + 1 with its signs, as the released code has it; another update where signs differ.
    State in at least float32: `step`, `exp_avg`, `exp_avg_sq`, with amsgrad `max_exp_avg_sq`.
    ValueError for settings that cannot be, a parameter in two groups or unknown, and multipliers that do not fit.
    """

    _shared = ("betas", "eps", "amsgrad", "maximize")
    _power = 1

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        released: bool = False,
        grad_mults: Mapping[Any, Mult] | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "released": released,
        }  # fmt: skip
        super().__init__(params, defaults, grad_mults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        non_negative("eps", group["eps"])
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        for at, beta in enumerate(betas):
            non_negative(f"betas[{at}]", beta)
            if not beta < 1:
                raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")

    def _update(self, launch: Launch) -> None:
        amsgrad = launch.settings["amsgrad"]
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")
        for parameter, state in zip(launch.params, launch.states, strict=True):
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in names:
                if name not in state:
                    wide = torch.promote_types(parameter.dtype, torch.float32)
                    state[name] = torch.zeros_like(parameter, dtype=wide)
        grad_mult_adamw_(
            launch.params,
            launch.grads,
            [state["exp_avg"] for state in launch.states],
            [state["exp_avg_sq"] for state in launch.states],
            [state["max_exp_avg_sq"] for state in launch.states] if amsgrad else None,
            launch.multipliers,
            lr=launch.lr,
            weight_decay=launch.weight_decay,
            steps=[state["step"] for state in launch.states],
            multiply_update=True,
            grad_scale=launch.grad_scale,
            found_inf=launch.found_inf,
            **launch.settings,
        )
