"""direct_conv2d on the native kernels: allocate, collect pointers, call. Shapes were checked before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._check import DTYPE_CODE
from repkern.ops._library import Native
from repkern.ops.direct_conv2d import reference
from repkern.ops.direct_conv2d.contract import METHODS, geometry, is_split, map_format, packed_shape

__all__ = ["direct_conv2d_packed", "direct_pack_weight", "prepare_direct_conv2d_packed"]


def direct_conv2d_packed(
    native: Native,
    plan: None,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Tensor:
    """[N, K, OH, OW] in the memory format of x."""
    form = map_format(x)
    x, packed = x.contiguous(memory_format=form), packed.contiguous()
    split = is_split(packed)
    if split and not native.module.direct_conv2d_splits_cpu():
        weight = reference.unpack(packed, out_channels, x.shape[1] // groups, kernel_size, groups)
        packed, split = reference.direct_pack_weight(weight, groups, METHODS.index("fma")), False
    bias = bias if bias is None else bias.contiguous()
    residual = residual if residual is None else residual.contiguous(memory_format=form)
    where = geometry(x, kernel_size, stride, padding, dilation)
    out = _check.empty((x.shape[0], out_channels, *where.size), x.dtype, x.device, form)
    # The fields of csrc/direct_conv2d/direct_conv2d.h's DirectParams, in its order.
    fields = [*x.shape, out_channels, *kernel_size, *where.stride, *where.padding, *where.dilation, groups]
    fields += [int(form is torch.channels_last), activation, int(split), DTYPE_CODE[x.dtype]]
    fields += [x.data_ptr(), packed.data_ptr(), _check.pointer(bias), _check.pointer(residual), out.data_ptr()]
    name, threads = "direct_conv2d_packed", torch.get_num_threads()
    space = _check.workspace(native.workspace_size(name)(fields, threads), x.device)
    native.function(name)(fields, space.data_ptr(), threads)
    return out


def direct_pack_weight(native: Native, plan: None, weight: Tensor, groups: int, method: int) -> Tensor:
    """As the reference: once per weight, and without arithmetic but the three roundings."""
    packed = reference.direct_pack_weight(weight, groups, method)
    split = METHODS[method] == "split"
    kept = _check.empty(
        packed_shape(weight.shape[0], weight.shape[1], tuple(weight.shape[2:]), groups, split),
        packed.dtype,
        weight.device,
    )
    return kept.copy_(packed)


def prepare_direct_conv2d_packed(
    native: Native,
    plan: None,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """direct_conv2d_packed on the CPU as a function of maps like x and residual: what they have in common is done."""
    form, dtype, device, split = map_format(x), x.dtype, x.device, is_split(packed)
    if split and not native.module.direct_conv2d_splits_cpu():
        tail = (out_channels, kernel_size, stride, padding, dilation, groups, activation)
        return lambda x, residual: direct_conv2d_packed(native, plan, x, packed, bias, residual, *tail)
    where = geometry(x, kernel_size, stride, padding, dilation)
    shape = (x.shape[0], out_channels, *where.size)
    packed, bias = packed.contiguous(), bias if bias is None else bias.contiguous()
    head = [*x.shape, out_channels, *kernel_size, *where.stride, *where.padding, *where.dilation, groups]
    head += [int(form is torch.channels_last), activation, int(split), DTYPE_CODE[dtype]]
    run, workspace_of = native.function("direct_conv2d_packed"), native.workspace_size("direct_conv2d_packed")
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
