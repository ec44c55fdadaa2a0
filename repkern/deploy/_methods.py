"""How an optimized convolution can be computed: forms its weights can have, and methods that read them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from repkern import _native
from repkern.ops import (
    OPS,
    direct_conv2d_packed,
    direct_pack_weight,
    direct_unpack_weight,
    winograd_conv2d_packed,
    winograd_stride2_conv2d_packed,
    winograd_stride2_transform_weight,
    winograd_transform_weight,
)
from repkern.ops._select import is_automatic, why_not
from repkern.ops.winograd_conv2d import ACTIVATIONS, TILES
from repkern.ops.winograd_conv2d.matrices import STRIDE2_TILE

__all__ = ["FORMS", "METHODS", "Call", "ConvSpec", "Form", "Maps", "Method", "activate", "torch_conv"]

Call = Callable[[Tensor, "Tensor | None"], Tensor]
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ConvSpec:
    """activation(conv2d(x, weight, bias, ...) + residual): what a layer computes. padding: zeros on both sides.

    precision: "fp32", "tf32", "bf16" or "fp16", as `optimize_for_inference`. linear: it stands for a linear layer.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = "none"
    precision: str = "fp32"
    linear: bool = False

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product where the map has one pixel."""
        return self.kernel_size == (1, 1) and self.padding == (0, 0) and self.groups == 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[K, C/g, kh, kw]."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def output_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Of an input [N, C, H, W]."""
        axes = zip(shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        spatial = [(size + 2 * pad - gap * (k - 1) - 1) // step + 1 for size, k, step, pad, gap in axes]
        return shape[0], self.out_channels, *spatial


class Maps(NamedTuple):
    """What a method must know of the input to say whether it can run."""

    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> Maps:
        """Those of x [N, C, H, W]."""
        return cls(x.dtype, x.device, x.is_contiguous(memory_format=torch.channels_last))


class Form(NamedTuple):
    """One way to keep weights. unpack gives back the very weights, None: it cannot, and the plain ones are kept too."""

    pack: Callable[[Tensor, ConvSpec], Tensor]
    unpack: Callable[[Tensor, ConvSpec], Tensor] | None


class Method(NamedTuple):
    """why_not(spec, maps): None where it can run. prepare(spec, packed, bias, x, residual): the call for such inputs.

    traced(spec, packed, bias, x, residual): the same through torch's dispatcher, for those who watch it.
    tile: of Winograd's algorithm, 0 for other methods.
    """

    form: str
    why_not: Callable[[ConvSpec, Maps], str | None]
    prepare: Callable[[ConvSpec, Tensor, Tensor | None, Tensor, Tensor | None], Call]
    traced: Callable[[ConvSpec, Tensor, Tensor | None, Tensor, Tensor | None], Tensor]
    tile: int = 0


_INPLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu_,
    "relu6": functools.partial(functional.relu6, inplace=True),
    "silu": functools.partial(functional.silu, inplace=True),
    "hardswish": functools.partial(functional.hardswish, inplace=True),
}


def activate(name: str, y: Tensor, residual: Tensor | None = None) -> Tensor:
    """activation(y + residual), in the memory of y where the sum has its shape and dtype."""
    if residual is not None:
        fits = residual.shape == y.shape and residual.dtype == y.dtype
        y = y.add_(residual) if fits else y + residual
    return _INPLACE[name](y)


def torch_conv(spec: ConvSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's convolution; on a GPU with TF32 as the precision says, whatever the global flags."""
    if spec.is_product and x.dim() == 4 and x.shape[2:] == (1, 1):
        return functional.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]
    if x.is_cuda and x.dtype == torch.float32:
        cudnn = torch.backends.cudnn
        return torch.ops.aten._convolution.default(
            x, weight, bias, spec.stride, spec.padding, spec.dilation, False, (0, 0), spec.groups,
            cudnn.benchmark, cudnn.deterministic, cudnn.enabled, spec.precision == "tf32",
        )  # fmt: skip
    return torch.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)


def _torch_traced(spec: ConvSpec, packed: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor | None) -> Tensor:
    return activate(spec.activation, torch_conv(spec, x, packed, bias), residual)


def _torch_prepare(spec: ConvSpec, packed: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor | None) -> Call:
    return lambda x, residual: activate(spec.activation, torch_conv(spec, x, packed, bias), residual)


# What torch.ops.mkldnn calls our activations, and their scalars.
_POINTWISE: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
    "hardswish": ("hardswish", []),
}


def _onednn_why_not(spec: ConvSpec, maps: Maps) -> str | None:
    if maps.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return "oneDNN runs on CPU tensors"
    if spec.linear:
        return "oneDNN's fused operators are for convolutions"
    if maps.dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN here is for float32 and bfloat16, not {maps.dtype}"
    return None if maps.channels_last else "its results are channels_last, the maps here are not"


def _onednn_prepare(spec: ConvSpec, packed: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor | None) -> Call:
    """torch's own fused operators: one call, and with packed weights no reordering of them in every call."""
    name, scalars = _POINTWISE[spec.activation]
    ops = torch.ops.mkldnn._convolution_pointwise
    geometry = (list(spec.padding), list(spec.stride), list(spec.dilation), spec.groups)
    if residual is None:
        unary = ops.default
        return lambda x, residual: unary(x, packed, bias, *geometry, name, scalars, "")
    if spec.activation in ("none", "relu"):
        binary, after = ops.binary, "relu" if spec.activation == "relu" else None
        # The operator writes to a copy of a contiguous residual, so that one in another order is put in order first.
        return lambda x, residual: binary(
            x, residual.contiguous(memory_format=torch.channels_last), packed, bias,  # type: ignore[union-attr]
            *geometry, "add", 1.0, after, [], "",
        )  # fmt: skip
    unary = ops.default
    return lambda x, residual: activate(
        spec.activation, unary(x, packed, bias, *geometry, "none", [], ""), residual
    )  # fmt: skip


def _onednn_pack(weight: Tensor, spec: ConvSpec) -> Tensor:
    size = (1, spec.in_channels, 14, 14)  # a hint: any size runs with the result
    reorder: Callable[..., Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight
    return reorder(weight.to_mkldnn(), spec.padding, spec.stride, spec.dilation, spec.groups, size)


def _wide(bias: Tensor | None) -> Tensor | None:
    return bias.float() if bias is not None and bias.dtype in _HALF else bias


def _winograd_why_not(spec: ConvSpec, maps: Maps, stride: int = 1) -> str | None:
    if spec.kernel_size != (3, 3) or spec.stride != (stride, stride) or spec.dilation != (1, 1):
        return f"this is for 3x3 kernels with stride {stride} and dilation 1"
    if spec.padding not in ((0, 0), (1, 1), (2, 2)):
        return f"Winograd is for padding 0, 1 or 2, not {spec.padding}"
    if maps.dtype not in (torch.float32, *_HALF):
        return f"Winograd is not chosen for {maps.dtype}"
    if maps.device.type == "cpu":
        return why_not("cpu", "cpu")
    if maps.device.type != "cuda" or stride != 1:
        return f"there are no kernels for {maps.device.type}"
    return why_not("cuda", "cuda") and why_not("triton", "cuda")


def _op_call(name: str, packed: Tensor, bias: Tensor | None, tail: tuple[Any, ...], x: Tensor, add: Any) -> Call:
    """The op past the dispatcher, checked once for all inputs of this shape; on the CPU most else is done once too."""
    op = OPS[name]
    # Names of their own for the memory: whoever exchanges `bias.data` must not pull it from under an unchecked call.
    packed, wide = packed.detach(), None if bias is None else _wide(bias.detach())
    plan = op.check(x, packed, wide, add, *tail)
    prepared = op.prepare(plan, x, packed, wide, add, *tail)

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        return op.run_checked(plan, x, packed, wide, residual, *tail)

    if prepared is None:
        return run
    chosen = prepared
    return lambda x, residual: chosen(x, residual) if is_automatic() else run(x, residual)


def _winograd(tile: int, form: str) -> Method:
    def prepare(spec: ConvSpec, packed: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor | None) -> Call:
        tail = (spec.out_channels, tile, spec.padding[0], spec.groups, ACTIVATIONS.index(spec.activation))
        return _op_call("winograd_conv2d_packed", packed, bias, tail, x, residual)

    def traced(spec: ConvSpec, packed: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor | None) -> Tensor:
        return winograd_conv2d_packed(
            x,
            packed,
            _wide(bias),
            out_channels=spec.out_channels,
            tile=tile,
            padding=spec.padding[0],
            groups=spec.groups,
            activation=spec.activation,
            residual=residual,
        )

    return Method(form, _winograd_why_not, prepare, traced, tile)


def _winograd_stride2(form: str) -> Method:
    def prepare(spec: ConvSpec, packed: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor | None) -> Call:
        tail = (spec.out_channels, spec.padding[0], spec.groups, ACTIVATIONS.index(spec.activation))
        return _op_call("winograd_stride2_conv2d_packed", packed, bias, tail, x, residual)

    def traced(spec: ConvSpec, packed: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor | None) -> Tensor:
        return winograd_stride2_conv2d_packed(
            x,
            packed,
            _wide(bias),
            out_channels=spec.out_channels,
            padding=spec.padding[0],
            groups=spec.groups,
            activation=spec.activation,
            residual=residual,
        )

    why_not = functools.partial(_winograd_why_not, stride=2)
    return Method(form, why_not, prepare, traced, STRIDE2_TILE)


def _transformed(tile: int) -> Form:
    return Form(lambda weight, spec: winograd_transform_weight(weight, tile, groups=spec.groups), None)


def _direct_why_not(spec: ConvSpec, maps: Maps) -> str | None:
    if maps.device.type != "cpu":
        return "direct convolution has kernels for the CPU only"
    if maps.dtype != torch.float32:
        return f"direct convolution is not chosen for {maps.dtype}"
    return why_not("cpu", "cpu")


def _split_why_not(spec: ConvSpec, maps: Maps) -> str | None:
    has_tiles = _native.native_build_info().get("isa_used") == "amx"
    return _direct_why_not(spec, maps) or (None if has_tiles else "the CPU has no tile unit (AMX)")


def _direct(form: str, reason: Callable[[ConvSpec, Maps], str | None]) -> Method:
    def prepare(spec: ConvSpec, packed: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor | None) -> Call:
        geometry = (spec.kernel_size, spec.stride, spec.padding, spec.dilation)
        tail = (spec.out_channels, *geometry, spec.groups, ACTIVATIONS.index(spec.activation))
        return _op_call("direct_conv2d_packed", packed, bias, tail, x, residual)

    def traced(spec: ConvSpec, packed: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor | None) -> Tensor:
        return direct_conv2d_packed(
            x,
            packed,
            bias,
            out_channels=spec.out_channels,
            kernel_size=spec.kernel_size,
            stride=spec.stride,
            padding=spec.padding,
            dilation=spec.dilation,
            groups=spec.groups,
            activation=spec.activation,
            residual=residual,
        )

    return Method(form, reason, prepare, traced)


def _pack_blocks(weight: Tensor, spec: ConvSpec) -> Tensor:
    wide = weight.float() if weight.dtype in _HALF else weight
    return direct_pack_weight(wide, groups=spec.groups, method="fma")


def _unpack(packed: Tensor, spec: ConvSpec) -> Tensor:
    return direct_unpack_weight(
        packed,
        out_channels=spec.out_channels,
        in_channels=spec.in_channels,
        kernel_size=spec.kernel_size,
        groups=spec.groups,
    )


#: How weights can be kept. "plain" is torch's own; "blocks" is read by direct convolution and by Winograd's that
#: transforms in the cache, for any tile; "split" is three bfloat16 parts.
FORMS: dict[str, Form] = {
    "plain": Form(lambda weight, spec: weight, lambda packed, spec: packed),
    "onednn": Form(_onednn_pack, None),
    "blocks": Form(_pack_blocks, _unpack),
    "split": Form(lambda weight, spec: direct_pack_weight(weight, groups=spec.groups, method="split"), _unpack),
    **{f"transformed F{tile}": _transformed(tile) for tile in TILES},
    "transformed stride 2": Form(
        lambda weight, spec: winograd_stride2_transform_weight(weight, groups=spec.groups), None
    ),
}

#: By name, as reports and the cache have it.
METHODS: dict[str, Method] = {
    "torch": Method("plain", lambda spec, maps: None, _torch_prepare, _torch_traced),
    "onednn": Method("plain", _onednn_why_not, _onednn_prepare, _torch_traced),
    "onednn packed": Method("onednn", _onednn_why_not, _onednn_prepare, _torch_traced),
    "direct fma": _direct("blocks", _direct_why_not),
    "direct split": _direct("split", _split_why_not),
    **{f"winograd F{tile}": _winograd(tile, "blocks") for tile in TILES},
    **{f"winograd F{tile} transformed": _winograd(tile, f"transformed F{tile}") for tile in TILES},
    "winograd stride 2": _winograd_stride2("blocks"),
    "winograd stride 2 transformed": _winograd_stride2("transformed stride 2"),
}
