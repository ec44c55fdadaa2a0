"""winograd_conv2d on the native kernels: allocate, collect pointers, call. Shapes were checked before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._check import DTYPE_CODE
from repkern.ops._library import Native
from repkern.ops.winograd_conv2d.contract import is_transformed, map_format, output_size, packed_shape
from repkern.ops.winograd_conv2d.matrices import STRIDE2_TILE
from repkern.ops.winograd_conv2d.reference import unpack_weight

__all__ = [
    "prepare_winograd_conv2d_packed",
    "prepare_winograd_stride2_conv2d_packed",
    "winograd_conv2d_packed",
    "winograd_stride2_conv2d_packed",
    "winograd_transform_weight",
]


def winograd_conv2d_packed(
    native: Native,
    plan: None,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    tile: int,
    padding: int,
    groups: int,
    activation: int,
) -> Tensor:
    """[N, K, H + 2 padding - 2, W + 2 padding - 2] in the memory format of x."""
    options = (out_channels, tile, padding, groups, activation)
    if native.suffix == "cpu":
        return prepare_winograd_conv2d_packed(native, plan, x, packed, bias, residual, *options)(x, residual)
    if not is_transformed(packed):
        packed = winograd_transform_weight(native, plan, unpack_weight(packed, out_channels), tile, groups)
    form = map_format(x)
    x, packed = x.contiguous(memory_format=form), packed.contiguous()
    bias = bias if bias is None else bias.contiguous()
    residual = residual if residual is None else residual.contiguous(memory_format=form)
    shape = (x.shape[0], out_channels, *output_size(x, padding))
    out = _check.empty(shape, x.dtype, x.device, form)
    fields = [*_sizes(x, packed, out_channels, 1, tile, padding, groups, activation), x.data_ptr(), packed.data_ptr()]
    fields += [_check.pointer(bias), _check.pointer(residual), out.data_ptr()]
    name, math = "winograd_conv2d_packed", int(_check.allow_tf32())
    space = _check.workspace(native.workspace_size(name)(fields, math), x.device)
    native.function(name)(fields, math, space.data_ptr(), native.stream(x.device))
    return out


def winograd_stride2_conv2d_packed(
    native: Native,
    plan: None,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    padding: int,
    groups: int,
    activation: int,
) -> Tensor:
    """[N, K, (H + 2 padding - 3) // 2 + 1, likewise] in the memory format of x."""
    options = (out_channels, padding, groups, activation)
    return prepare_winograd_stride2_conv2d_packed(native, plan, x, packed, bias, residual, *options)(x, residual)


def winograd_transform_weight(native: Native, plan: None, weight: Tensor, tile: int, groups: int) -> Tensor:
    """[g, ceil(K/g / 16), (tile + 2)^2, C/g, 16]."""
    weight = weight.contiguous()
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    packed = _check.empty(packed_shape(weight.shape[0], weight.shape[1], tile, groups), dtype, weight.device)
    # The fields of WinogradWeight, in its order.
    fields = [weight.shape[0], weight.shape[1], groups, tile, DTYPE_CODE[weight.dtype]]
    fields += [weight.data_ptr(), packed.data_ptr()]
    last = torch.get_num_threads() if native.suffix == "cpu" else native.stream(weight.device)
    native.function("winograd_transform_weight")(fields, last)
    return packed


def prepare_winograd_conv2d_packed(
    native: Native,
    plan: None,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    tile: int,
    padding: int,
    groups: int,
    activation: int,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """winograd_conv2d_packed on the CPU as a function of maps like x and residual: what they have in common is done."""
    return _prepared(native, x, packed, bias, out_channels, 1, tile, padding, groups, activation)


def prepare_winograd_stride2_conv2d_packed(
    native: Native,
    plan: None,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    padding: int,
    groups: int,
    activation: int,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """As `prepare_winograd_conv2d_packed`."""
    return _prepared(native, x, packed, bias, out_channels, 2, STRIDE2_TILE, padding, groups, activation)


def _sizes(
    x: Tensor, packed: Tensor, out_channels: int, stride: int, tile: int, padding: int, groups: int, activation: int
) -> list[int]:
    """The fields of csrc/winograd_conv2d/winograd_conv2d.h's WinogradParams before the pointers, in its order."""
    channels_last = int(map_format(x) is torch.channels_last)
    return [*x.shape, out_channels, groups, padding, stride, tile, packed.shape[2], channels_last, activation,
            DTYPE_CODE[x.dtype]]  # fmt: skip


def _prepared(
    native: Native, x: Tensor, packed: Tensor, bias: Tensor | None, out_channels: int, stride: int, *options: int
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """options: tile, padding, groups, activation."""
    form, dtype, device = map_format(x), x.dtype, x.device
    shape = (x.shape[0], out_channels, *output_size(x, options[1], stride))
    packed, bias = packed.contiguous(), bias if bias is None else bias.contiguous()
    head = _sizes(x, packed, out_channels, stride, *options)
    run = native.function("winograd_conv2d_packed")
    workspace_of = native.workspace_size("winograd_conv2d_packed")
    bytes_for: dict[int, int] = {}  # by the number of threads

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        x, residual = _check.in_memory(x).contiguous(memory_format=form), _check.in_memory(residual)
        residual = residual if residual is None else residual.contiguous(memory_format=form)
        out = _check.empty(shape, dtype, device, form)
        fields = [*head, x.data_ptr(), packed.data_ptr(), _check.pointer(bias), _check.pointer(residual)]
        fields.append(out.data_ptr())
        threads = torch.get_num_threads()
        size = bytes_for.get(threads)
        if size is None:
            size = bytes_for[threads] = workspace_of(fields, threads)
        run(fields, _check.workspace(size, device).data_ptr(), threads)
        return out

    return call
