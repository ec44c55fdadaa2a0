"""grad_mult_sgd_: a step of SGD for all parameters, gradients multiplied first (docs/ops/grad_mult_sgd.md)."""

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
    pack_multipliers,
    per_tensor,
    require_flag,
    run_in_place,
)
from repkern.ops._grad_mult_plan import Plan, plan_for
from repkern.ops._library import define_op

__all__ = ["grad_mult_sgd_"]

OP = "grad_mult_sgd_"


def _check(
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
) -> Plan:
    check_numbers(OP, len(params), lr=lr, weight_decay=weight_decay, first_step=first_step)
    check_number(OP, "momentum", momentum, 0)
    check_number(OP, "dampening", dampening)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(
            f"{OP}: nesterov needs momentum > 0 and dampening = 0, got momentum={momentum}, dampening={dampening}"
        )
    lists = [params, grads]
    names: tuple[str, ...] = ("params", "grads")
    if momentum != 0:
        lists.append(momentum_buffers)
        names += ("momentum_buffers",)
    plan = plan_for(OP, names, lists, Packed(multipliers, layout, identity))
    require_flag(OP, "grad_scale", grad_scale, plan.device)
    require_flag(OP, "found_inf", found_inf, plan.device)
    return plan


_step = define_op(
    "grad_mult_sgd",
    OP,
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] multipliers, int[] layout, "
    "float[] identity, float[] lr, float[] weight_decay, int[] first_step, float momentum, float dampening, "
    "bool nesterov, bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()",
    check=_check,
    fake=lambda *args: None,
    mutates=(0, 2),
)


def grad_mult_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    multipliers: Sequence[Multiplier] | None,
    *,
    lr: float | Sequence[float],
    weight_decay: float | Sequence[float],
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: Sequence[bool] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of torch.optim.SGD for all parameters at once, with every gradient multiplied first, in place.

    Per parameter, g = M * grad / grad_scale (negative when `maximize`); then g += weight_decay * param; then with
    momentum buf = momentum * buf + (1 - dampening) * g, on the first step buf = g, and g = buf, or g += momentum * buf
    with `nesterov`; then param -= lr * g. Weight decay is not multiplied (arXiv 2205.15242, section 3.2). Gradients
    stay as they are.

    params: any shapes, all on one device; float32, float64, bfloat16 or float16, also mixed. Changed in place.
    grads: like `params`, dense, same dtypes.
    momentum_buffers: like `params`, but float32 for parameters in half precision. Changed in place; ignored (None)
        with momentum 0.
    multipliers: per parameter None, a `ChannelMultiplier` or a tensor of the parameter's shape, in float32 (float64
        for float64 parameters).
    lr, weight_decay: one number or one per parameter, so that parameter groups share the launch.
    first_step: per parameter, whether its buffer holds nothing yet; None: all hold something. With dampening 0 a
        buffer of zeros needs no mark.
    grad_scale, found_inf: None or float32 tensors of one element on the same device, as GradScaler hands them out.
        Where found_inf is not 0 nothing changes. Nothing waits for the device.

    Contiguous and channels_last parameters are updated where they lie, others through a copy. An empty list is fine.
    Raises TypeError or ValueError that names the tensor, the got and the wanted value; RuntimeError where a gradient
    would be recorded (call it under torch.no_grad()).
    """
    params, grads = _require_tensors(OP, "params", params), _require_tensors(OP, "grads", grads)
    momentum = require_number(OP, "momentum", momentum, 0)
    if momentum != 0:
        momentum_buffers = [] if momentum_buffers is None else momentum_buffers
        momentum_buffers = _require_tensors(OP, "momentum_buffers", momentum_buffers)
    count = len(params)
    if count == 0:
        return
    packed = pack_multipliers(OP, count, multipliers)
    marks = [0] * count if first_step is None else [int(bool(mark)) for mark in first_step]
    run_in_place(
        _step,
        params, grads, list(momentum_buffers) if momentum != 0 and momentum_buffers is not None else [],
        packed.tensors, packed.layout, packed.identity,
        per_tensor(OP, "lr", lr, count), per_tensor(OP, "weight_decay", weight_decay, count), marks,
        momentum, require_number(OP, "dampening", dampening), bool(nesterov), bool(maximize), grad_scale, found_inf,
    )  # fmt: skip
