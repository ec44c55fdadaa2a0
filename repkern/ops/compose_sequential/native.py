"""compose_sequential on the native kernels: allocate, collect pointers, call. Shapes were checked before."""

from __future__ import annotations

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._check import DTYPE_CODE
from repkern.ops._library import Native

__all__ = ["compose_sequential", "compose_sequential_backward"]


def compose_sequential(native: Native, plan: None, first: Tensor, second: Tensor, groups: int) -> Tensor:
    """[Co, Ci/g, K, K] with K = K1 + K2 - 1."""
    first, second = first.contiguous(), second.contiguous()
    size = first.shape[-1] + second.shape[-1] - 1
    out = _check.empty((second.shape[0], first.shape[1], size, size), first.dtype, first.device)
    _call(native, "compose_sequential_forward", first, second, groups, (out.data_ptr(),))
    return out


def compose_sequential_backward(
    native: Native, plan: None, grad: Tensor, first: Tensor, second: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `first` and `second`."""
    first, second = first.contiguous(), second.contiguous()
    grad = grad.to(first.dtype).contiguous()
    grad_first, grad_second = _check.empty_like(first), _check.empty_like(second)
    pointers = (grad.data_ptr(), grad_first.data_ptr(), grad_second.data_ptr())
    _call(native, "compose_sequential_backward", first, second, groups, pointers)
    return grad_first, grad_second


def _call(native: Native, name: str, first: Tensor, second: Tensor, groups: int, pointers: tuple[int, ...]) -> None:
    # The fields of csrc/compose_sequential/compose_sequential.h's ComposeParams, in its order.
    fields = [
        second.shape[0],
        first.shape[1] * groups,
        first.shape[0],
        groups,
        first.shape[-1],
        second.shape[-1],
    ]
    fields += [first.data_ptr(), second.data_ptr()]
    code = DTYPE_CODE[first.dtype]
    threads = (torch.get_num_threads(),) if native.suffix == "cpu" else ()
    space = _check.workspace(native.workspace_size(name)(fields, code, *threads), first.device)
    if native.suffix == "cpu":
        native.function(name)(fields, *pointers, code, space.data_ptr(), *threads)
    else:
        math = int(_check.allow_tf32())
        native.function(name)(fields, *pointers, code, math, space.data_ptr(), native.stream(first.device))
