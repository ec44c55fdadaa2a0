"""compose_sequential: two stacked convolutions -> the one that computes the same (docs/ops/compose_sequential.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._library import define_op

__all__ = ["compose_sequential"]

OP = "compose_sequential"
_DTYPES = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


def _check_forward(first: Tensor, second: Tensor, groups: int) -> None:
    _check.require_tensor(OP, "first", first)
    _check.require_tensor(OP, "second", second)
    _check.require_same(OP, {"first": first, "second": second}, _DTYPES)
    for name, kernel in (("first", first), ("second", second)):
        if kernel.dim() != 4 or kernel.shape[2] != kernel.shape[3] or 0 in kernel.shape:
            raise ValueError(f"{OP}: `{name}` must be a non-empty [out, in/groups, K, K], got {tuple(kernel.shape)}")
    if groups < 1:
        raise ValueError(f"{OP}: `groups` must be at least 1, got {groups}")
    for name, kernel in (("first", first), ("second", second)):
        if kernel.shape[0] % groups:
            raise ValueError(
                f"{OP}: the {kernel.shape[0]} output channels of `{name}` must be divisible by `groups` (={groups})"
            )
    if second.shape[1] * groups != first.shape[0]:
        raise ValueError(
            f"{OP}: `second` takes {second.shape[1]} x {groups} groups = {second.shape[1] * groups} channels, "
            f"but `first` gives {first.shape[0]}"
        )
    _kernel_size(first, second)


def _kernel_size(first: Tensor, second: Tensor) -> int:
    """K1 + K2 - 1, of a kernel that fits."""
    size = first.shape[-1] + second.shape[-1] - 1
    _check.require_fits(OP, "the bytes of the kernel", second.shape[0], first.shape[1], size, size, 8)
    return size


def _check_backward(grad: Tensor, first: Tensor, second: Tensor, groups: int) -> None:
    _check_forward(first, second, groups)
    size = first.shape[-1] + second.shape[-1] - 1
    _check.require_tensor(OP, "grad", grad)
    _check.require_shape(OP, "grad", grad, (second.shape[0], first.shape[1], size, size))
    _check.require_floating(OP, grad.dtype)
    if grad.device != first.device:
        raise ValueError(f"{OP}: `grad` is on {grad.device} but `first` is on {first.device}")


def _fake_forward(first: Tensor, second: Tensor, groups: int) -> Tensor:
    size = first.shape[-1] + second.shape[-1] - 1
    return first.new_empty(second.shape[0], first.shape[1], size, size)


def _fake_backward(grad: Tensor, first: Tensor, second: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return first.new_empty(first.shape), second.new_empty(second.shape)


def _setup_context(ctx: Any, args: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(args[0], args[1])
    ctx.groups = args[2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    first, second = ctx.saved_tensors
    return (*_compose_backward.call_from_autograd(grad, first, second, ctx.groups), None)


_compose = define_op(
    OP,
    OP,
    "(Tensor first, Tensor second, int groups) -> Tensor",
    check=_check_forward,
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
_compose_backward = define_op(
    OP,
    f"{OP}_backward",
    "(Tensor grad, Tensor first, Tensor second, int groups) -> (Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
)


def compose_sequential(first: Tensor, second: Tensor, *, groups: int = 1) -> Tensor:
    """The kernel of conv(second) after conv(first), both with `groups` and no padding in between. Differentiable.

    first: [Cm, Ci/g, K1, K1]; second: [Co, Cm/g, K2, K2]; any K1, K2 >= 1; float32 or float64, half precision is
    computed in float32. Returns [Co, Ci/g, K1+K2-1, K1+K2-1]: the true composition (paper 2204.00826, Eq. 3 and
    supplement Eq. 2), not a cross-correlation of the kernels.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit together.
    """
    _check.require_tensor(OP, "first", first)
    _check.require_tensor(OP, "second", second)
    groups = _check.require_integer(OP, "groups", groups, 1)
    if first.dtype in _HALF and second.dtype == first.dtype:
        return _compose(first.float(), second.float(), groups).to(first.dtype)
    return _compose(first, second, groups)
