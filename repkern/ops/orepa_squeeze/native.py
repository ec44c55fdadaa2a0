"""orepa_squeeze on the native kernels: allocate, collect addresses, call. Shapes were checked before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._check import DTYPE_CODE
from repkern.ops._library import Native
from repkern.ops.orepa_squeeze.plan import LayerPlan, Plan

__all__ = ["orepa_squeeze_many", "orepa_squeeze_many_backward"]


def orepa_squeeze_many(
    native: Native,
    plan: Plan,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    out_dtype: torch.dtype | None,
    channels_last: bool,
) -> list[Tensor]:
    """Every layer's kernel, [Co, Ci/g, K, K], written by one call."""
    tensors = [t.contiguous() for t in tensors]
    dtype, device = tensors[0].dtype, tensors[0].device
    out_dtype = out_dtype or dtype
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    kernels = [_check.empty(layer.shape, out_dtype, device, memory_format) for layer in plan.layers]
    arguments = ([k.data_ptr() for k in kernels], DTYPE_CODE[dtype], DTYPE_CODE[out_dtype], channels_last)
    _call(native, "orepa_squeeze_forward", _layer_fields(plan, tensors), arguments, tensors[0])
    return kernels


def orepa_squeeze_many_backward(
    native: Native, plan: Plan, grads: Sequence[Tensor], tensors: Sequence[Tensor], layout: Sequence[int]
) -> list[Tensor]:
    """The gradient of every tensor but the prior filters, written by one call."""
    tensors = [t.contiguous() for t in tensors]
    dtype = tensors[0].dtype
    grads = [grad.to(dtype).contiguous() for grad in grads]
    made = [
        _check.empty_like(tensor) if wanted else None
        for tensor, wanted in zip(tensors, plan.differentiable, strict=True)
    ]
    addresses = [0 if gradient is None else gradient.data_ptr() for gradient in made] + [0]
    fields: list[int] = []
    for grad, layer in zip(grads, plan.layers, strict=True):
        fields.append(grad.data_ptr())
        fields += _pointer_fields(layer, addresses, dtype.itemsize)
        if layer.has_unused_scales:
            scale = made[layer.scale]
            assert scale is not None
            scale.zero_()
    _call(native, "orepa_squeeze_backward", _layer_fields(plan, tensors), (fields, DTYPE_CODE[dtype]), tensors[0])
    return [gradient for gradient in made if gradient is not None]


def _call(native: Native, name: str, layers: list[int], arguments: tuple[object, ...], like: Tensor) -> None:
    """Allocate the workspace the kernel asks for, then run it with its threads or its stream."""
    code = DTYPE_CODE[like.dtype]
    if native.suffix == "cpu":
        threads = torch.get_num_threads()
        space = _check.workspace(native.workspace_size(name)(layers, code, threads), like.device)
        native.function(name)(layers, *arguments, space.data_ptr(), threads)
    else:
        space = _check.workspace(native.workspace_size(name)(layers, code), like.device)
        native.function(name)(
            layers, *arguments, int(_check.allow_tf32()), space.data_ptr(), native.stream(like.device)
        )


def _layer_fields(plan: Plan, tensors: Sequence[Tensor]) -> list[int]:
    """The fields of csrc/orepa_squeeze/orepa_squeeze.h's SqueezeLayer, in its order."""
    addresses = [tensor.data_ptr() for tensor in tensors] + [0]  # slot -1 is the null pointer
    item = tensors[0].element_size()
    fields: list[int] = []
    for layer in plan.layers:
        fields += layer.integers
        fields += _pointer_fields(layer, addresses, item)
        fields.append(addresses[layer.prior_filter])
    return fields


def _pointer_fields(layer: LayerPlan, addresses: list[int], item: int) -> list[int]:
    scale = addresses[layer.scale]
    fields = [addresses[slot] for slot in layer.slots]
    return fields + [0 if offset < 0 else scale + offset * item for offset in layer.scale_offsets]
