"""winograd_conv2d: 3x3 convolution for inference with fewer multiplications (docs/ops/winograd_conv2d.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._library import define_op
from repkern.ops.winograd_conv2d.contract import (
    ACTIVATIONS,
    OP,
    check_conv,
    check_stride2_conv,
    check_weight,
    map_format,
    output_size,
    packed_shape,
)
from repkern.ops.winograd_conv2d.matrices import STRIDE2_TILE, TILES
from repkern.ops.winograd_conv2d.reference import pack, transform_stride2_weight

__all__ = [
    "ACTIVATIONS",
    "TILES",
    "winograd_conv2d",
    "winograd_conv2d_packed",
    "winograd_pack_weight",
    "winograd_stride2_conv2d",
    "winograd_stride2_conv2d_packed",
    "winograd_stride2_transform_weight",
    "winograd_transform_weight",
]

_HALF = (torch.bfloat16, torch.float16)
_INSTEAD = "it is for inference: use torch.conv2d to train, or call it under torch.no_grad()"


def _fake_conv(x: Tensor, packed: Tensor, bias: Any, residual: Any, out_channels: int, *options: int) -> Tensor:
    shape = (x.shape[0], out_channels, *output_size(x, options[1]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=map_format(x))


def _fake_stride2(x: Tensor, packed: Tensor, bias: Any, residual: Any, out_channels: int, *options: int) -> Tensor:
    shape = (x.shape[0], out_channels, *output_size(x, options[0], 2))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=map_format(x))


def _fake_weight(weight: Tensor, tile: int, groups: int) -> Tensor:
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty(packed_shape(weight.shape[0], weight.shape[1], tile, groups), dtype=dtype)


_packed_op = define_op(
    OP,
    f"{OP}_packed",
    "(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int out_channels, int tile, int padding, int groups, "
    "int activation) -> Tensor",
    check=check_conv,
    fake=_fake_conv,
    inference_only=_INSTEAD,
)
# The CUDA and Triton kernels are of stride 1: on a GPU a network has few layers of stride 2, and cuDNN for them.
_stride2_op = define_op(
    OP,
    "winograd_stride2_conv2d_packed",
    "(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int out_channels, int padding, int groups, "
    "int activation) -> Tensor",
    check=check_stride2_conv,
    fake=_fake_stride2,
    inference_only=_INSTEAD,
    backends=("reference", "cpu"),
)
_weight_op = define_op(
    OP,
    "winograd_transform_weight",
    "(Tensor weight, int tile, int groups) -> Tensor",
    check=check_weight,
    fake=_fake_weight,
    inference_only=_INSTEAD,
)


def _weight_arguments(weight: Any, groups: Any, tile: Any = STRIDE2_TILE) -> tuple[Tensor, int, int]:
    """TypeError or ValueError naming what is not a tensor or an integer."""
    _check.require_tensor(OP, "weight", weight)
    return weight, _check.require_integer(OP, "tile", tile), _check.require_integer(OP, "groups", groups, 1)


def _check_arguments(x: Any, weights: Any, bias: Any, residual: Any, name: str = "packed") -> None:
    for own, tensor in (("x", x), (name, weights)):
        _check.require_tensor(OP, own, tensor)
    for own, tensor in (("bias", bias), ("residual", residual)):
        _check.require_tensor(OP, own, tensor, optional=True)


def _integers(**values: Any) -> tuple[int, ...]:
    return tuple(_check.require_integer(OP, name, value) for name, value in values.items())


def winograd_transform_weight(weight: Tensor, tile: int, *, groups: int = 1) -> Tensor:
    """The transformed filters of F(tile x tile, 3x3), once per weight, for `winograd_conv2d_packed`.

    weight [K, C/g, 3, 3] in float32, float64, bfloat16 or float16; tile: 2, 4, 5 or 6. Returns U = G w G^T, computed in
    float64, in blocks of 16 output channels: [g, ceil(K/g / 16), (tile + 2)^2, C/g, 16], float32 (float64 for float64),
    zeros behind the last output channel. RuntimeError where a gradient would be recorded.
    """
    weight, tile, groups = _weight_arguments(weight, groups, tile)
    return _weight_op(weight, tile, groups)


def winograd_stride2_transform_weight(weight: Tensor, *, groups: int = 1) -> Tensor:
    """The transformed filters of stride 2, once per weight, for `winograd_stride2_conv2d_packed`.

    weight [K, C/g, 3, 3] in float32, float64, bfloat16 or float16. Returns the different entries of U = G w G^T,
    computed in float64: [g, ceil(K/g / 16), 36, C/g, 16], float32 (float64 for float64).
    """
    weight, _, groups = _weight_arguments(weight, groups)
    check_weight(weight, STRIDE2_TILE, groups)
    _refuse_gradient(weight)
    return transform_stride2_weight(weight, groups)


def winograd_pack_weight(weight: Tensor, *, groups: int = 1) -> Tensor:
    """The kernels themselves, once per weight, for `winograd_conv2d_packed` with any tile.

    weight [K, C/g, 3, 3] in float32, float64, bfloat16 or float16. Returns [g, ceil(K/g / 16), 9, C/g, 16], float32
    (float64 for float64), zeros behind the last output channel: as large as the weight. The CPU kernels transform it in
    the cache, a part at a time; on other backends every call transforms it first.
    """
    weight, _, groups = _weight_arguments(weight, groups)
    check_weight(weight, TILES[0], groups)
    return pack(weight.flatten(2), groups).to(weight.dtype if weight.dtype == torch.float64 else torch.float32)


def winograd_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int,
    tile: int,
    padding: int = 1,
    groups: int = 1,
    activation: str | None = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """As `winograd_conv2d`, with weights prepared by `winograd_transform_weight` for the same tile, or by
    `winograd_pack_weight`.

    packed and bias are float32, or float64 with x. Packed kernels give other roundings than transformed ones.
    """
    _check_arguments(x, packed, bias, residual)
    options = _integers(out_channels=out_channels, tile=tile, padding=padding, groups=groups)
    return _packed_op(x, packed, bias, residual, *options, _code(activation))


def winograd_stride2_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int,
    padding: int = 1,
    groups: int = 1,
    activation: str | None = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """As `winograd_stride2_conv2d`, with weights prepared by `winograd_stride2_transform_weight`, or by
    `winograd_pack_weight`.

    packed and bias are float32, or float64 with x.
    """
    _check_arguments(x, packed, bias, residual)
    options = _integers(out_channels=out_channels, padding=padding, groups=groups)
    return _stride2_op(x, packed, bias, residual, *options, _code(activation))


def winograd_stride2_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv2d(x, weight, bias, stride 2, padding) + residual) with 5.06 of 9 multiplications; for inference.

    Arguments as those of `winograd_conv2d`; the result is [N, K, (H + 2 padding - 3) // 2 + 1, likewise]. The even
    inputs are a convolution with 2x2 taps, by F(4x4, 2x2); the odd ones are multiplied as they are. Relative L2 error
    in float32 about 4e-7. On CPUs; elsewhere the reference runs. Raises ValueError, TypeError and RuntimeError as that
    function.
    """
    _check_arguments(x, weight, bias, residual, "weight")
    (groups,) = _integers(groups=groups)
    _check_together(x, weight, groups)
    packed = winograd_stride2_transform_weight(weight, groups=groups)
    return winograd_stride2_conv2d_packed(
        x,
        packed,
        bias if bias is None else bias.to(packed.dtype),
        out_channels=weight.shape[0],
        padding=padding,
        groups=groups,
        activation=activation,
        residual=residual,
    )


def _check_together(x: Tensor, weight: Tensor, groups: int) -> None:
    """TypeError or ValueError unless weight [K, C/g, 3, 3] can be that of a convolution of x [N, C, H, W]."""
    if weight.dtype != x.dtype:
        raise TypeError(f"{OP}: `weight` is {weight.dtype} but `x` is {x.dtype}; all must share one dtype")
    if weight.dim() == 4 and x.dim() == 4 and weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"{OP}: `weight` takes {weight.shape[1]} x {groups} groups = {weight.shape[1] * groups} channels, "
            f"but `x` has {x.shape[1]}"
        )


def _refuse_gradient(weight: Tensor) -> None:
    if torch.is_grad_enabled() and weight.requires_grad:
        raise RuntimeError(f"winograd_stride2_transform_weight has no gradient; {_INSTEAD}")


def _code(activation: str | None) -> int:
    name = "none" if activation is None else activation
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{OP}: `activation` must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    return ACTIVATIONS.index(name)


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    tile: int | str = "auto",
) -> Tensor:
    """activation(conv2d(x, weight, bias, stride 1, padding) + residual) by Winograd's algorithm; for inference.

    x [N, C, H, W], contiguous or channels_last (the result has the same format, neither is copied), float32, float64,
    bfloat16 or float16; weight [K, C/g, 3, 3] and bias [K] of the same dtype; residual like the result
    [N, K, H + 2 padding - 2, W + 2 padding - 2]. padding: 0, 1 or 2. activation: one of `ACTIVATIONS` or None.
    tile: 2, 4, 5, 6, or "auto": 4 in float32 and float64, 2 in half precision on a GPU, where the products are half
    too. Relative L2 error against float64 in float32: about 3e-7 (tile 2), 1e-6 (4), 2e-6 (5), 4e-6 (6). NaN and
    infinity spread to every output of their tile. Deterministic. Stride 2: `winograd_stride2_conv2d`.
    Source: Lavin and Gray, arXiv 1509.09308; points in `matrices.py`.
    Raises ValueError or TypeError for arguments that do not fit, RuntimeError where a gradient would be recorded.
    """
    _check_arguments(x, weight, bias, residual, "weight")
    (groups,) = _integers(groups=groups)
    if isinstance(tile, str):
        if tile != "auto":
            raise ValueError(f"{OP}: `tile` must be 'auto' or one of {', '.join(map(str, TILES))}, got {tile!r}")
        tile = 2 if x.dtype in _HALF and x.is_cuda else 4
    _check_together(x, weight, groups)
    packed = winograd_transform_weight(weight, tile, groups=groups)
    return winograd_conv2d_packed(
        x,
        packed,
        bias if bias is None else bias.to(packed.dtype),
        out_channels=weight.shape[0],
        tile=tile,
        padding=padding,
        groups=groups,
        activation=activation,
        residual=residual,
    )
