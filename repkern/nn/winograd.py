"""WinogradConv2d: a 3x3 convolution for inference with its filters transformed once."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from repkern.nn._weight_hooks import current_bias, current_weight
from repkern.ops import winograd_conv2d_packed, winograd_transform_weight
from repkern.ops.winograd_conv2d import ACTIVATIONS, TILES

__all__ = ["WinogradConv2d"]

_INSTEAD = "use repkern.ops.direct_conv2d or nn.Conv2d, or repkern.optimize_for_inference, which chooses"
_HALF = (torch.bfloat16, torch.float16)
_ACTIVATION_OF: dict[type[nn.Module], str] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}


class _Prepared(NamedTuple):
    """Transformed filters and a bias of their dtype, and what they were made from."""

    made_from: tuple[Any, ...]
    packed: Tensor
    bias: Tensor | None


class WinogradConv2d(nn.Conv2d):
    """activation(conv2d(x)) by Winograd's algorithm: nn.Conv2d in inference, for 3x3 kernels with stride 1.

    Arguments and state_dict as nn.Conv2d's; parameters require no gradients. padding: 0, 1, 2, "same" or "valid".
    tile: 2, 4, 5, 6 or "auto" (4; in half precision on a GPU 2). activation: one of `ops.winograd_conv2d.ACTIVATIONS`,
    a module nn.ReLU, ReLU6, SiLU or Hardswish, or None.
    Input [N, C, H, W] or [C, H, W], contiguous or channels_last; forward also takes a residual, added before the
    activation. The filters are transformed at the first call, and again after load_state_dict, `to` or any change of
    the weights that torch counts (all but those through `.data` and of inference tensors). Compiled code transforms
    them in every call.
    ValueError for another kernel or stride, naming what to use; RuntimeError where a gradient would be recorded.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        tile: int | str = "auto",
        activation: str | nn.Module | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        _check_geometry(self)
        if tile != "auto" and tile not in TILES:
            raise ValueError(
                f"WinogradConv2d: tile must be 'auto' or one of {', '.join(map(str, TILES))}, got {tile!r}"
            )
        self.tile = tile
        self.activation = _activation_name(activation)
        self.requires_grad_(False)
        self._prepared: _Prepared | None = None

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, tile: int | str = "auto", activation: str | nn.Module | None = None
    ) -> WinogradConv2d:
        """The same convolution, with a copy of the weights of `conv`. ValueError where it is not 3x3 with stride 1."""
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"WinogradConv2d.from_conv: an nn.Conv2d is needed, got {type(conv).__name__}")
        _check_geometry(conv)
        made = nn.utils.skip_init(
            cls,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            tile=tile,
            activation=activation,
        )
        with torch.no_grad():
            made.weight.copy_(current_weight(conv))
            if made.bias is not None:
                made.bias.copy_(current_bias(conv))
        return made.train(conv.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[N, C, H, W] -> [N, K, H', W'] in the memory format of x."""
        if torch.is_grad_enabled() and (
            self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        ):
            raise RuntimeError(
                "WinogradConv2d is for inference, but its parameters require gradients: use nn.Conv2d to train, or "
                "call it under torch.no_grad()"
            )
        self._check_input(x)
        if x.dim() == 3:
            y = self(x[None], None if residual is None else residual[None])
            return y[0]
        padding = self._pad
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        prepared = self._filters()
        return winograd_conv2d_packed(
            x,
            prepared.packed,
            prepared.bias,
            out_channels=self.out_channels,
            tile=self._tile,
            padding=padding,
            groups=self.groups,
            activation=self.activation,
            residual=residual,
        )

    @property
    def _pad(self) -> int:
        if isinstance(self.padding, str):
            return 1 if self.padding == "same" else 0
        return self.padding[0]

    @property
    def _tile(self) -> int:
        if isinstance(self.tile, int):
            return self.tile
        return 2 if self.weight.dtype in _HALF and self.weight.is_cuda else 4

    def _check_input(self, x: Tensor) -> None:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"WinogradConv2d: the input must be [N, {self.in_channels}, H, W] or [{self.in_channels}, H, W], got "
                f"{tuple(x.shape)}"
            )
        if x.dtype != self.weight.dtype:
            raise TypeError(f"WinogradConv2d: the input is {x.dtype} but the weights are {self.weight.dtype}")
        if x.device != self.weight.device:
            raise ValueError(f"WinogradConv2d: the input is on {x.device} but the weights are on {self.weight.device}")

    def _filters(self) -> _Prepared:
        """Transformed filters of the weights as they are now. Threads that meet here each make the same ones."""
        if torch.compiler.is_compiling():
            return self._transformed(())
        prepared, now = self._prepared, (*_state(self.weight), *_state(self.bias), self._tile)
        if prepared is None or prepared.made_from != now:
            prepared = self._transformed(now)
            self._prepared = prepared
        return prepared

    def _transformed(self, made_from: tuple[Any, ...]) -> _Prepared:
        with torch.no_grad():
            packed = winograd_transform_weight(self.weight, self._tile, groups=self.groups)
            bias = None if self.bias is None else self.bias.to(packed.dtype)
        return _Prepared(made_from, packed, bias)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}

    def extra_repr(self) -> str:
        """As nn.Conv2d, with tile and activation."""
        return f"{super().extra_repr()}, tile={self.tile!r}, activation={self.activation!r}"


def _state(parameter: Tensor | None) -> tuple[Any, ...]:
    """What changes with the values of a parameter. Inference tensors count no versions."""
    if parameter is None:
        return (None,)
    version = -1 if parameter.is_inference() else parameter._version
    return id(parameter), parameter.data_ptr(), version, parameter.dtype, parameter.device


def _activation_name(activation: str | nn.Module | None) -> str:
    name = activation or "none"
    if isinstance(activation, nn.Module):
        name = _ACTIVATION_OF.get(type(activation), type(activation).__name__)
    if name not in ACTIVATIONS:
        raise ValueError(f"WinogradConv2d: activation must be one of {', '.join(ACTIVATIONS)} or None, got {name!r}")
    return str(name)


def _check_geometry(conv: nn.Conv2d) -> None:
    for name, value, wanted in (
        ("kernel_size", tuple(conv.kernel_size), (3, 3)),
        ("stride", tuple(conv.stride), (1, 1)),
        ("dilation", tuple(conv.dilation), (1, 1)),
    ):
        if value != wanted:
            raise ValueError(f"WinogradConv2d: {name} must be {wanted}, got {value}; {_INSTEAD}")
    if not isinstance(conv.padding, str) and tuple(conv.padding) not in ((0, 0), (1, 1), (2, 2)):
        raise ValueError(f"WinogradConv2d: padding must be 0, 1 or 2, got {tuple(conv.padding)}; {_INSTEAD}")
