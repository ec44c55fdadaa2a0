"""compose_sequential on a Triton kernel: allocate, say which index runs where, launch. Shapes were checked before."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from repkern.ops import _check
from repkern.ops._triton import TL_DTYPE, block_size, contraction_size, dot_precision, launch_options, on_device
from repkern.ops.compose_sequential.triton_kernels import product_over_positions_kernel

__all__ = ["compose_sequential", "compose_sequential_backward"]


class _Matrices(NamedTuple):
    """A kernel [channels, channels per group, K, K] as one matrix for each group and position.

    Its dimension 0 counts the rows, or the columns when `transposed`.
    """

    tensor: Tensor
    groups: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.tensor.shape[0] // self.groups, self.tensor.shape[1]
        return (second, first) if self.transposed else (first, second)

    @property
    def strides(self) -> tuple[int, int, int]:
        """From row to row, column to column and group to group."""
        first, second = self.tensor.stride(0), self.tensor.stride(1)
        group = self.tensor.shape[0] // self.groups * first
        return (second, first, group) if self.transposed else (first, second, group)


def compose_sequential(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """[Co, Ci/g, K, K] with K = K1 + K2 - 1: at p, second at q times first at p - q."""
    first, second = first.contiguous(), second.contiguous()
    size = first.shape[-1] + second.shape[-1] - 1
    out = _check.empty((second.shape[0], first.shape[1], size, size), first.dtype, first.device)
    _multiply(_Matrices(second, groups), _Matrices(first, groups), _Matrices(out, groups), sign=-1)
    return out


def compose_sequential_backward(grad: Tensor, first: Tensor, second: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Gradients of `first` and `second`: at p, the other one at q, transposed, times grad at p + q."""
    first, second, grad = first.contiguous(), second.contiguous(), grad.to(first.dtype).contiguous()
    grad_first = _check.empty(first.shape, first.dtype, first.device)
    grad_second = _check.empty(second.shape, second.dtype, second.device)
    _multiply(_Matrices(second, groups, True), _Matrices(grad, groups), _Matrices(grad_first, groups), sign=1)
    _multiply(_Matrices(first, groups), _Matrices(grad, groups, True), _Matrices(grad_second, groups, True), sign=1)
    return grad_first, grad_second


def _multiply(a: _Matrices, b: _Matrices, out: _Matrices, sign: int) -> None:
    """out at p = sum over q of (a at q) @ (b at p + sign * q)."""
    dtype, size = out.tensor.dtype, out.tensor.shape[-1]
    rows, columns = out.shape
    high = 16 if dtype is torch.float64 else 64
    m, n = block_size(rows, 16, high), block_size(columns * size * size, 16, high)
    precision = dot_precision(dtype)
    tiles = out.groups * triton.cdiv(rows, m) * triton.cdiv(columns * size * size, n)
    with on_device(out.tensor.device):
        product_over_positions_kernel[(tiles,)](
            a.tensor, b.tensor, out.tensor, rows, columns, a.shape[1],
            a.tensor.shape[-1], b.tensor.shape[-1], size, *a.strides, *b.strides, *out.strides,
            sign, TL_DTYPE[dtype], precision, m, n, contraction_size(precision), **launch_options(m, n),
        )  # fmt: skip
