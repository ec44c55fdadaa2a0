"""grad_mult_adamw_: a step of AdamW for all parameters, gradients multiplied first (docs/ops/grad_mult_adamw.md)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from repkern.ops._check import require_number
from repkern.ops._check import require_tensors as _require_tensors
from repkern.ops._grad_mult import (
    Multiplier,
    Packed,
    check_number,
    check_numbers,
    check_steps,
    pack_multipliers,
    per_tensor,
    require_flag,
    run_in_place,
)
from repkern.ops._grad_mult_plan import Plan, plan_for
from repkern.ops._library import define_op

__all__ = ["grad_mult_adamw_"]

OP = "grad_mult_adamw_"


def _check_betas(*betas: float) -> list[float]:
    """The two as floats; TypeError or ValueError that names the one that is not in [0, 1)."""
    for at, beta in enumerate(betas):
        if isinstance(beta, bool) or not isinstance(beta, int | float):
            raise TypeError(f"{OP}: `betas[{at}]` must be a number in [0, 1), got {beta!r}")
        if not 0 <= beta < 1:
            raise ValueError(f"{OP}: `betas[{at}]` must be in [0, 1), got {beta}")
    return [float(beta) for beta in betas]


def _check(
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
) -> Plan:
    check_numbers(OP, len(params), lr=lr, weight_decay=weight_decay)
    _check_betas(beta1, beta2)
    check_number(OP, "eps", eps, 0)
    lists = [params, grads, exp_avgs, exp_avg_sqs]
    names: tuple[str, ...] = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    if amsgrad:
        lists.append(max_exp_avg_sqs)
        names += ("max_exp_avg_sqs",)
    plan = plan_for(OP, names, lists, Packed(multipliers, layout, identity))
    check_steps(OP, steps, len(params), plan.device)
    require_flag(OP, "grad_scale", grad_scale, plan.device)
    require_flag(OP, "found_inf", found_inf, plan.device)
    return plan


_step = define_op(
    "grad_mult_adamw",
    OP,
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor[] multipliers, int[] layout, float[] identity, "
    "float[] lr, float[] weight_decay, float beta1, float beta2, float eps, bool amsgrad, bool maximize, "
    "bool decoupled, bool multiply_update, Tensor? grad_scale, Tensor? found_inf) -> ()",
    check=_check,
    fake=lambda *args: None,
    mutates=(0, 2, 3, 4, 5),
)


def grad_mult_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None,
    multipliers: Sequence[Multiplier] | None,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Sequence[float],
    steps: Sequence[Tensor],
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = True,
    multiply_update: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of torch.optim.AdamW for all parameters at once, with every gradient multiplied first, in place.

    Per parameter, with t = step + 1: g = M * grad / grad_scale (negative when `maximize`);
    param *= 1 - lr * weight_decay when `decoupled`, else g += weight_decay * param;
    m += (1 - beta1) * (g - m); v = beta2 * v + (1 - beta2) * g^2; with `amsgrad` v_max = max(v_max, v) is used for v;
    param -= lr / (1 - beta1^t) * U * m / (sqrt(v / (1 - beta2^t)) + eps), U = M when `multiply_update`, else 1.

    AdamW divides a factor of the gradient out again (up to eps), so it is U through which constant scales act: the sum
    of branches with scales s_k trained by AdamW is one kernel with M = sum |s_k| and `multiply_update`. The released
    code does the same with M = sum s_k, which is wrong where signs differ.

    params, grads, multipliers, lr, weight_decay, grad_scale, found_inf: as in `grad_mult_sgd_`.
    exp_avgs, exp_avg_sqs, max_exp_avg_sqs: like `params`, but float32 for parameters in half precision. Changed in
        place; the last is ignored (None) without `amsgrad`.
    steps: per parameter a float32 tensor of one element on the same device, the number of steps done. The op adds 1
        to each, unless found_inf is not 0.

    Raises TypeError or ValueError that names the tensor, the got and the wanted value; RuntimeError where a gradient
    would be recorded (call it under torch.no_grad()).
    """
    params, grads = _require_tensors(OP, "params", params), _require_tensors(OP, "grads", grads)
    exp_avgs, exp_avg_sqs = _require_tensors(OP, "exp_avgs", exp_avgs), _require_tensors(OP, "exp_avg_sqs", exp_avg_sqs)
    steps = _require_tensors(OP, "steps", steps)
    if amsgrad:
        max_exp_avg_sqs = _require_tensors(OP, "max_exp_avg_sqs", [] if max_exp_avg_sqs is None else max_exp_avg_sqs)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"{OP}: `betas` must be two numbers in [0, 1), got {betas!r}")
    beta1, beta2 = _check_betas(*betas)
    count = len(params)
    if count == 0:
        return
    packed = pack_multipliers(OP, count, multipliers)
    run_in_place(
        _step,
        params, grads, exp_avgs, exp_avg_sqs,
        list(max_exp_avg_sqs) if amsgrad and max_exp_avg_sqs is not None else [], steps,
        packed.tensors, packed.layout, packed.identity,
        per_tensor(OP, "lr", lr, count), per_tensor(OP, "weight_decay", weight_decay, count),
        beta1, beta2, require_number(OP, "eps", eps, 0), bool(amsgrad), bool(maximize), bool(decoupled),
        bool(multiply_update), grad_scale, found_inf,
    )  # fmt: skip
