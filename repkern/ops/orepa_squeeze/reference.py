"""orepa_squeeze in plain torch: the meaning, on any device and dtype (math: docs/ops/orepa_squeeze.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repkern.ops.orepa_squeeze.layers import SqueezeBranches, kernel_shape, unpack

__all__ = ["orepa_squeeze_many", "orepa_squeeze_many_backward", "squeeze", "squeeze_backward"]


def orepa_squeeze_many(
    tensors: Sequence[Tensor], layout: Sequence[int], out_dtype: torch.dtype | None, channels_last: bool
) -> list[Tensor]:
    """Every layer's kernel, [Co, Ci/g, K, K]."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    kernels = [squeeze(layer) for layer in unpack(tensors, layout)]
    return [kernel.to(out_dtype or kernel.dtype).contiguous(memory_format=memory_format) for kernel in kernels]


def orepa_squeeze_many_backward(
    grads: Sequence[Tensor], tensors: Sequence[Tensor], layout: Sequence[int]
) -> list[Tensor]:
    """The gradient of every tensor but the prior filters, in the order they were given."""
    answer: list[Tensor] = []
    for grad, layer in zip(grads, unpack(tensors, layout), strict=True):
        answer += squeeze_backward(grad.to(tensors[0].dtype), layer)
    return answer


def _per_group(tensor: Tensor, groups: int) -> Tensor:
    """[C, ...] -> [g, C/g, ...]."""
    return tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def _reduce_of(layer: SqueezeBranches) -> Tensor:
    """[g, Cm/g, Ci/g], the identity included."""
    assert layer.reduce is not None
    reduce = _per_group(layer.reduce, layer.groups)
    if not layer.identity_reduce:
        return reduce
    rows, columns = reduce.shape[1:]
    identity = torch.zeros(rows, columns, dtype=reduce.dtype, device=reduce.device)
    at = torch.arange(rows, device=reduce.device)
    identity[at, at % columns] = 1
    return reduce + identity


def _branches(layer: SqueezeBranches) -> list[Tensor | None]:
    """The six unscaled kernels, each [Co, Ci/g, K, K]."""
    co, cig, k, _ = kernel_shape(layer)
    g = layer.groups
    kernels: list[Tensor | None] = [layer.origin, None, None, None, None, None]
    if layer.avg is not None:
        kernels[1] = (layer.avg / (k * k))[:, :, None, None].expand(co, cig, k, k)
    if layer.prior is not None and layer.prior_filter is not None:
        kernels[2] = layer.prior[:, :, None, None] * layer.prior_filter[:, None]
    if layer.expand is not None:
        product = torch.einsum("gti,gothw->goihw", _reduce_of(layer), _per_group(layer.expand, g))
        kernels[3] = product.reshape(co, cig, k, k)
    if layer.pointwise is not None:
        kernels[4] = torch.nn.functional.pad(layer.pointwise[:, :, None, None], [k // 2] * 4)
    if layer.depthwise is not None and layer.project is not None:
        depthwise = layer.depthwise.reshape(g, cig, -1, k, k)
        project = layer.project.reshape(g, co // g, cig, -1)
        kernels[5] = torch.einsum("goiq,giqhw->goihw", project, depthwise).reshape(co, cig, k, k)
    return kernels


def squeeze(layer: SqueezeBranches) -> Tensor:
    """sum over branches b of scale[b] * kernel_b: [Co, Ci/g, K, K] (paper Eqs. 3 and 4)."""
    total: Tensor | None = None
    for kernel, scale in zip(_branches(layer), layer.scale_rows(), strict=True):
        if kernel is None:
            continue
        scaled = kernel if scale is None else kernel * scale[:, None, None, None]
        total = scaled if total is None else total + scaled
    assert total is not None
    return total


def squeeze_backward(grad: Tensor, layer: SqueezeBranches) -> list[Tensor]:
    """Gradients of the tensors present, in field order, without `prior_filter`."""
    co, cig, k, _ = kernel_shape(layer)
    g = layer.groups
    rows = layer.scale_rows()
    # d loss / d (unscaled kernel of branch b)
    scaled = [grad if row is None else grad * row[:, None, None, None] for row in rows]
    grads: dict[str, Tensor] = {}
    if layer.origin is not None:
        grads["origin"] = scaled[0]
    if layer.avg is not None:
        grads["avg"] = scaled[1].mean(dim=(2, 3))
    if layer.prior is not None and layer.prior_filter is not None:
        grads["prior"] = torch.einsum("oihw,ohw->oi", scaled[2], layer.prior_filter)
    if layer.pointwise is not None:
        grads["pointwise"] = scaled[4][:, :, k // 2, k // 2]
    if layer.reduce is not None and layer.expand is not None:
        outer, expand = _per_group(scaled[3], g), _per_group(layer.expand, g)
        grads["reduce"] = torch.einsum("goihw,gothw->gti", outer, expand).reshape(layer.reduce.shape)
        grads["expand"] = torch.einsum("goihw,gti->gothw", outer, _reduce_of(layer)).reshape(layer.expand.shape)
    if layer.depthwise is not None and layer.project is not None:
        outer = scaled[5].reshape(g, co // g, cig, k, k)
        depthwise = layer.depthwise.reshape(g, cig, -1, k, k)
        project = layer.project.reshape(g, co // g, cig, -1)
        grads["depthwise"] = torch.einsum("goihw,goiq->giqhw", outer, project).reshape(layer.depthwise.shape)
        grads["project"] = torch.einsum("goihw,giqhw->goiq", outer, depthwise).reshape(layer.project.shape)
    if layer.scale is not None:
        rows_of = [torch.zeros_like(row) for row in layer.scale]
        for kernel, at in zip(_branches(layer), layer.scale_positions(), strict=True):
            if kernel is not None and at is not None:
                rows_of[at] = (grad * kernel).sum(dim=(1, 2, 3))
        grads["scale"] = torch.stack(rows_of)
    order = ("origin", "avg", "prior", "pointwise", "reduce", "expand", "depthwise", "project", "scale")
    return [grads[name].contiguous() for name in order if name in grads]
