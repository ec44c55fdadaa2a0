"""orepa_squeeze on the native kernels: allocate, collect pointers, call. Shapes were checked before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._check import DTYPE_CODE, pointer
from repkern.ops._library import Native
from repkern.ops.orepa_squeeze.layers import GRADIENT_FIELDS, SqueezeBranches, kernel_shape, unpack

__all__ = ["orepa_squeeze_many", "orepa_squeeze_many_backward"]


def orepa_squeeze_many(
    native: Native,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    out_dtype: torch.dtype | None,
    channels_last: bool,
) -> list[Tensor]:
    """Every layer's kernel, [Co, Ci/g, K, K], written by one call."""
    tensors = [t.contiguous() for t in tensors]
    layers = unpack(tensors, layout)
    dtype, device = tensors[0].dtype, tensors[0].device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    kernels = [_check.empty(kernel_shape(layer), out_dtype or dtype, device, memory_format) for layer in layers]
    arguments = (
        [kernel.data_ptr() for kernel in kernels],
        DTYPE_CODE[dtype],
        DTYPE_CODE[out_dtype or dtype],
        channels_last,
    )
    _call(native, "orepa_squeeze_forward", _layer_fields(layers), arguments, dtype, device)
    return kernels


def orepa_squeeze_many_backward(
    native: Native, grads: Sequence[Tensor], tensors: Sequence[Tensor], layout: Sequence[int]
) -> list[Tensor]:
    """The gradient of every tensor but the prior filters, written by one call."""
    tensors = [t.contiguous() for t in tensors]
    layers = unpack(tensors, layout)
    dtype, device = tensors[0].dtype, tensors[0].device
    grads = [grad.to(dtype).contiguous() for grad in grads]
    answer: list[Tensor] = []
    fields: list[int] = []
    for grad, layer in zip(grads, layers, strict=True):
        wanted = _empty_gradients(layer)
        answer += [tensor for tensor in wanted.values() if tensor is not None]
        fields.append(grad.data_ptr())
        fields += [pointer(wanted[name]) for name in GRADIENT_FIELDS[:-1]]
        fields += _scale_pointers(wanted["scale"], layer)
    _call(native, "orepa_squeeze_backward", _layer_fields(layers), (fields, DTYPE_CODE[dtype]), dtype, device)
    return answer


def _call(
    native: Native,
    name: str,
    layers: list[int],
    arguments: tuple[object, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Allocate the workspace the kernel asks for, then run it with its threads or its stream."""
    threads = (torch.get_num_threads(),) if native.suffix == "cpu" else ()
    size = native.workspace_size(name)(layers, DTYPE_CODE[dtype], *threads)
    space = _check.workspace(size, device)
    if native.suffix == "cpu":
        native.function(name)(layers, *arguments, space.data_ptr(), *threads)
    else:
        math = int(_check.allow_tf32())
        native.function(name)(layers, *arguments, math, space.data_ptr(), native.stream(device))


def _layer_fields(layers: Sequence[SqueezeBranches]) -> list[int]:
    """The fields of csrc/orepa_squeeze/orepa_squeeze.h's SqueezeLayer, in its order."""
    fields: list[int] = []
    for layer in layers:
        co, cig, k, _ = kernel_shape(layer)
        ci = cig * layer.groups
        cm = 0 if layer.reduce is None else layer.reduce.shape[0]
        expansion = 0 if layer.depthwise is None else layer.depthwise.shape[0] // ci
        fields += [co, ci, cm, layer.groups, k, expansion, int(layer.identity_reduce)]
        fields += [pointer(getattr(layer, name)) for name in GRADIENT_FIELDS[:-1]]
        fields += _scale_pointers(layer.scale, layer)
        fields.append(pointer(layer.prior_filter))
    return fields


def _scale_pointers(scale: Tensor | None, layer: SqueezeBranches) -> list[int]:
    if scale is None:
        return [0] * len(layer.present)
    row = scale.shape[1] * scale.element_size()
    return [0 if at is None else scale.data_ptr() + at * row for at in layer.scale_positions()]


def _empty_gradients(layer: SqueezeBranches) -> dict[str, Tensor | None]:
    gradients: dict[str, Tensor | None] = {}
    for name in GRADIENT_FIELDS:
        tensor = getattr(layer, name)
        gradients[name] = None if tensor is None else _check.empty(tensor.shape, tensor.dtype, tensor.device)
    scale = gradients["scale"]
    if scale is not None and scale.shape[0] != sum(layer.present):
        scale.zero_()  # rows of absent branches
    return gradients
