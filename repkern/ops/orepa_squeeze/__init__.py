"""orepa_squeeze: all branches of an OREPA block -> one convolution kernel. Math: docs/ops/orepa_squeeze.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._library import define_op
from repkern.ops.orepa_squeeze.layers import OP, TENSOR_FIELDS, SqueezeBranches, kernel_shape, pack
from repkern.ops.orepa_squeeze.plan import Plan, differentiable, plan_of

__all__ = ["SqueezeBranches", "orepa_squeeze", "orepa_squeeze_many"]

_HALF = (torch.bfloat16, torch.float16)


def _check_forward(
    tensors: Sequence[Tensor], layout: Sequence[int], out_dtype: torch.dtype | None, channels_last: bool
) -> Plan:
    if out_dtype is not None:
        _check.require_floating(OP, out_dtype)
    return plan_of(tensors, layout)


def _check_backward(grads: Sequence[Tensor], tensors: Sequence[Tensor], layout: Sequence[int]) -> Plan:
    plan = plan_of(tensors, layout)
    layers = plan.layers
    if len(grads) != len(layers):
        raise ValueError(f"{OP}: {len(layers)} gradients are needed, one a layer, got {len(grads)}")
    for grad, layer in zip(grads, layers, strict=True):
        _check.require_shape(OP, "grad", grad, layer.shape)
        _check.require_floating(OP, grad.dtype)
        if grad.device != tensors[0].device:
            raise ValueError(f"{OP}: `grad` is on {grad.device} but the parameters are on {tensors[0].device}")
    return plan


def _fake_forward(
    tensors: Sequence[Tensor], layout: Sequence[int], out_dtype: torch.dtype | None, channels_last: bool
) -> list[Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dtype, device = out_dtype or tensors[0].dtype, tensors[0].device
    return [
        torch.empty(layer.shape, dtype=dtype, device=device, memory_format=memory_format)
        for layer in plan_of(tensors, layout).layers
    ]


def _fake_backward(grads: Sequence[Tensor], tensors: Sequence[Tensor], layout: Sequence[int]) -> list[Tensor]:
    wanted = zip(tensors, differentiable(layout), strict=True)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, needed in wanted if needed]


def _setup_context(ctx: Any, args: Sequence[Any], output: Any) -> None:
    tensors, layout, *_ = args
    ctx.save_for_backward(*tensors)
    ctx.layout = layout
    ctx.outputs = [(kernel.shape, kernel.dtype, kernel.device) for kernel in output]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    filled = [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(grads, ctx.outputs, strict=True)
    ]
    gradients = iter(squeeze_many_backward.call_from_autograd(filled, tensors, ctx.layout))
    return [next(gradients) if needed else None for needed in differentiable(ctx.layout)], None, None, None


squeeze_many = define_op(
    "orepa_squeeze",
    "orepa_squeeze_many",
    "(Tensor[] tensors, int[] layout, ScalarType? out_dtype, bool channels_last) -> Tensor[]",
    check=_check_forward,
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_backward,
)
squeeze_many_backward = define_op(
    "orepa_squeeze",
    "orepa_squeeze_many_backward",
    "(Tensor[] grads, Tensor[] tensors, int[] layout) -> Tensor[]",
    check=_check_backward,
    fake=_fake_backward,
)


def _as_computed(layer: SqueezeBranches) -> SqueezeBranches:
    """Half-precision parameters are computed in float32; the default prior filter is filled in, never in half."""
    if layer.prior is not None and layer.prior_filter is None:
        from repkern.ops.orepa_squeeze.prior import dct_filter

        dtype = torch.float32 if layer.prior.dtype in _HALF else layer.prior.dtype
        co, _, k, _ = kernel_shape(layer)
        _check.require_odd(OP, "origin", k)
        _check.require_fits(OP, "the bytes of the prior filter", co, k, k, 8)
        layer = layer._replace(prior_filter=dct_filter(co, k, dtype=dtype, device=layer.prior.device))
    fields = [t.float() if isinstance(t, Tensor) and t.dtype in _HALF else t for t in layer]
    return SqueezeBranches(*fields)  # type: ignore[arg-type]


def _check_layers(layers: Sequence[SqueezeBranches]) -> list[SqueezeBranches]:
    """TypeError for what is not a layer of tensors, and for parameters of two dtypes.

    A prior filter may be float32 beside parameters in half precision.
    """
    if isinstance(layers, SqueezeBranches | Tensor | str) or not isinstance(layers, Sequence):
        raise TypeError(f"{OP}: `layers` must be a list of SqueezeBranches, got {type(layers).__name__}")
    first_name, first = "", None
    for n, layer in enumerate(layers):
        where = f"layers[{n}]." if len(layers) > 1 else ""
        if not isinstance(layer, SqueezeBranches):
            raise TypeError(f"{OP}: `layers[{n}]` must be a SqueezeBranches, got {type(layer).__name__}")
        for name, tensor in zip(TENSOR_FIELDS, layer, strict=False):
            if tensor is None:
                continue
            _check.require_tensor(OP, f"{where}{name}", tensor, optional=True)
            if name == "prior_filter":
                continue
            _check.require_floating(OP, tensor.dtype, f"`{where}{name}`")  # type: ignore[union-attr]
            if first is None:
                first_name, first = f"{where}{name}", tensor.dtype  # type: ignore[union-attr]
            elif tensor.dtype != first:  # type: ignore[union-attr]
                raise TypeError(
                    f"{OP}: `{where}{name}` is {tensor.dtype} but "  # type: ignore[union-attr]
                    f"`{first_name}` is {first}; all must share one dtype"
                )
        _check.require_integer(OP, f"{where}groups", layer.groups, 1)
        if not isinstance(layer.identity_reduce, bool):
            raise TypeError(f"{OP}: `{where}identity_reduce` must be True or False, got {layer.identity_reduce!r}")
    return list(layers)


def orepa_squeeze_many(
    layers: Sequence[SqueezeBranches],
    *,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> list[Tensor]:
    """The squeezed kernels of many layers in one launch, forward and backward.

    layers: one SqueezeBranches each; all tensors on one device and of one dtype, prior filters of half-precision layers
    in that or in float32. Returns one [Co, Ci/g, K, K] a layer.
    Otherwise as `orepa_squeeze`. An empty list gives an empty list.
    """
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"{OP}: memory_format must be contiguous_format or channels_last, got {memory_format}")
    if out_dtype is not None:
        _check.require_floating(OP, out_dtype)
    layers = _check_layers(layers)
    if not layers:
        return []
    half = {t.dtype for layer in layers for t in layer[:10] if isinstance(t, Tensor) and t.dtype in _HALF}
    if out_dtype is None and half:
        out_dtype = half.pop()
    tensors, layout = pack([_as_computed(layer) for layer in layers])
    if not tensors:
        raise ValueError(f"{OP}: every branch is None; at least one is needed")
    return squeeze_many(tensors, layout, out_dtype, memory_format is torch.channels_last)


def orepa_squeeze(
    origin: Tensor | None,
    avg: Tensor | None = None,
    prior: Tensor | None = None,
    pointwise: Tensor | None = None,
    reduce: Tensor | None = None,
    expand: Tensor | None = None,
    depthwise: Tensor | None = None,
    project: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    groups: int = 1,
    prior_filter: Tensor | None = None,
    identity_reduce: bool = False,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Squeeze the branches of one OREPA block into one kernel (paper 2204.00826, Eqs. 3-4, Fig. 6). Differentiable.

    Shapes as in `SqueezeBranches`; a branch that is None is absent and costs nothing. `scale`: [6, Co] in the order
    origin, avg, prior, 1x1-KxK, 1x1, dw-pw, or one row per present branch; None means ones. `prior_filter` [Co, K, K]
    defaults to the paper's cosine filters (supplement, Table 1), in float32 where the parameters are in half precision;
    a given one may be float32 beside them too.
    float32 or float64 parameters; half-precision ones are computed in float32 and give a half-precision kernel.
    `out_dtype` and `memory_format` are what the kernel is written in. Returns [Co, Ci/g, K, K].
    Raises ValueError or TypeError, naming the tensor, for shapes, dtypes or devices that do not fit together.
    """
    layer = SqueezeBranches(
        origin,
        avg,
        prior,
        pointwise,
        reduce,
        expand,
        depthwise,
        project,
        scale,
        prior_filter,
        groups,
        identity_reduce,
    )
    return orepa_squeeze_many([layer], out_dtype=out_dtype, memory_format=memory_format)[0]
