"""direct_conv2d: convolution for inference with packed weights and a fused end (docs/ops/direct_conv2d.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repkern import _native
from repkern.ops import _check
from repkern.ops._library import define_op
from repkern.ops.direct_conv2d import reference
from repkern.ops.direct_conv2d.contract import (
    ACTIVATIONS,
    DEPTH,
    LANES,
    METHODS,
    OP,
    check_conv,
    check_weight,
    is_split,
    map_format,
    output_size,
    packed_shape,
)

__all__ = ["direct_conv2d", "direct_conv2d_packed", "direct_pack_weight", "direct_unpack_weight"]

_INSTEAD = "it is for inference: use torch.conv2d to train, or call it under torch.no_grad()"
# On a GPU the reference runs, which is torch.conv2d; there is nothing to gain over cuDNN without kernels of its own.
_BACKENDS = ("reference", "cpu")
Size = int | Sequence[int]


def _fake_conv(
    x: Tensor, packed: Tensor, bias: Any, residual: Any, out_channels: int, *options: Sequence[int]
) -> Tensor:
    size = output_size(x, *options[:4])
    shape = (x.shape[0], out_channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=map_format(x))


def _fake_weight(weight: Tensor, groups: int, method: int) -> Tensor:
    split = METHODS[method] == "split"
    shape = packed_shape(weight.shape[0], weight.shape[1], weight.shape[2:], groups, split)
    return weight.new_empty(shape, dtype=torch.bfloat16 if split else weight.dtype)


_packed_op = define_op(
    OP,
    f"{OP}_packed",
    "(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int out_channels, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int groups, int activation) -> Tensor",
    check=check_conv,
    fake=_fake_conv,
    inference_only=_INSTEAD,
    backends=_BACKENDS,
)
_weight_op = define_op(
    OP,
    "direct_pack_weight",
    "(Tensor weight, int groups, int method) -> Tensor",
    check=check_weight,
    fake=_fake_weight,
    inference_only=_INSTEAD,
    backends=_BACKENDS,
)


def _pair(name: str, value: Size) -> list[int]:
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ValueError(f"{OP}: `{name}` must be one number or two, got {value}")
        return [_check.require_integer(OP, name, number) for number in value]
    return [_check.require_integer(OP, name, value)] * 2


def _code(activation: str | None) -> int:
    name = "none" if activation is None else activation
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{OP}: `activation` must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    return ACTIVATIONS.index(name)


def _best_method(weight: Tensor, groups: int) -> str:
    """ "split" where the tile unit is in use and its tiles of 16 outputs and 32 products are not mostly zeros."""
    usable = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.dim() == 4
    if not usable or _native.native_build_info().get("isa_used") != "amx":
        return "fma"
    length = weight.shape[1] * weight.shape[2] * weight.shape[3]
    return "split" if weight.shape[0] // max(groups, 1) >= LANES // 2 and length >= DEPTH // 2 else "fma"


def direct_pack_weight(weight: Tensor, *, groups: int = 1, method: str = "auto") -> Tensor:
    """The filters in the order in which the kernels read them, once per weight, for `direct_conv2d_packed`.

    weight [K, C/g, kh, kw] in float32 or float64. method "fma": the dtype of weight in blocks of 16 output channels,
    [g, ceil(K/g / 16), kh kw, C/g, 16]. "split": bfloat16 in three parts whose sum is the weight, half again its size,
    for CPUs with AMX; elsewhere it is correct but slow. "auto": "split" where AMX is in use and tiles would not be
    mostly empty, else "fma". Both undo exactly with `direct_unpack_weight`. Raises ValueError or TypeError for
    arguments that do not fit, RuntimeError where a gradient would be recorded.
    """
    _check.require_tensor(OP, "weight", weight)
    groups = _check.require_integer(OP, "groups", groups, 1)
    if not isinstance(method, str) or method not in ("auto", *METHODS):
        raise ValueError(f"{OP}: `method` must be 'auto', {', '.join(map(repr, METHODS))}, got {method!r}")
    chosen = _best_method(weight, groups) if method == "auto" else method
    packed: Tensor = _weight_op(weight, groups, METHODS.index(chosen))
    return packed


def direct_unpack_weight(
    packed: Tensor, *, out_channels: int, in_channels: int, kernel_size: Size, groups: int = 1
) -> Tensor:
    """The weight [K, C/g, kh, kw] of `direct_pack_weight`'s result, bit for bit.

    The exception are "split" weights that round to an infinite bfloat16 (above 3.38e38) or lie below 2^-100, where the
    lowest bits are lost. ValueError when the sizes do not fit `packed`.
    """
    _check.require_tensor(OP, "packed", packed)
    groups = _check.require_integer(OP, "groups", groups)
    in_channels = _check.require_integer(OP, "in_channels", in_channels)
    out_channels = _check.require_integer(OP, "out_channels", out_channels)
    if groups < 1 or in_channels < 1 or in_channels % groups or out_channels < 1 or out_channels % groups:
        raise ValueError(
            f"{OP}: in_channels (={in_channels}) and out_channels (={out_channels}) must be divisible by "
            f"`groups` (={groups})"
        )
    size = _pair("kernel_size", kernel_size)
    if min(size) < 1:
        raise ValueError(f"{OP}: `kernel_size` must be at least 1, got {size}")
    shape = packed_shape(out_channels, in_channels // groups, size, groups, is_split(packed))
    if tuple(packed.shape) != shape:
        raise ValueError(f"{OP}: `packed` must have shape {shape}, got {tuple(packed.shape)}")
    return reference.unpack(packed, out_channels, in_channels // groups, size, groups)


def direct_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: Size,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    activation: str | None = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """As `direct_conv2d`, with weights packed before by `direct_pack_weight`; float64 maps take "fma" weights."""
    _check_arguments(x, packed, bias, residual)
    return _packed_op(
        x,
        packed,
        bias,
        residual,
        _check.require_integer(OP, "out_channels", out_channels, 1),
        _pair("kernel_size", kernel_size),
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        _check.require_integer(OP, "groups", groups, 1),
        _code(activation),
    )


def _check_arguments(x: Any, weights: Any, bias: Any, residual: Any, name: str = "packed") -> None:
    for own, tensor in (("x", x), (name, weights)):
        _check.require_tensor(OP, own, tensor)
    for own, tensor in (("bias", bias), ("residual", residual)):
        _check.require_tensor(OP, own, tensor, optional=True)


def direct_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """activation(conv2d(x, weight, bias, stride, padding, dilation, groups) + residual); for inference.

    x [N, C, H, W] in float32 or float64, contiguous or channels_last (faster; the result has the same format); weight
    [K, C/g, kh, kw] and bias [K] of the same dtype; residual like the result. Sizes are one number or (height, width).
    activation: none, relu, relu6, silu, hardswish or None. method: as in `direct_pack_weight`.
    Relative L2 error against float64 in float32: at most 1e-6, with either method. NaN in `x` reaches the outputs that
    read it; infinity does too, as NaN with method "split". Deterministic. Raises ValueError or TypeError for arguments
    that do not fit, RuntimeError where a gradient would be recorded.
    """
    _check_arguments(x, weight, bias, residual, "weight")
    groups = _check.require_integer(OP, "groups", groups, 1)
    if weight.dtype != x.dtype:
        raise TypeError(f"{OP}: `weight` is {weight.dtype} but `x` is {x.dtype}; all must share one dtype")
    if weight.dim() == 4 and x.dim() == 4 and weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"{OP}: `weight` takes {weight.shape[1]} x {groups} groups = {weight.shape[1] * groups} channels, "
            f"but `x` has {x.shape[1]}"
        )
    return direct_conv2d_packed(
        x,
        direct_pack_weight(weight, groups=groups, method=method),
        bias,
        out_channels=weight.shape[0],
        kernel_size=tuple(weight.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        activation=activation,
        residual=residual,
    )
