"""The base of every re-parameterizable block."""

from __future__ import annotations

import contextlib
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from repkern.nn.agreement import ROLES, agreed, disagrees, expected, push, require_foldable, rewritten
from repkern.nn.branch_weight import named_as_now
from repkern.nn.fold import KernelBias
from repkern.nn.geometry import Geometry, same_padding

__all__ = ["RepBlock", "rename_earlier"]

_FIXED = frozenset(("in_channels", "out_channels", "kernel_size", "groups"))
_REWRITABLE = frozenset(("stride", "padding", "dilation", "padding_mode"))


def _one_node(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which under torch.fx's symbolic tracing stands for one call of the module instead of being traced."""

    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tracer = next((value.tracer for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)), None)
        if tracer is None:
            return forward(self, *args, **kwargs)
        return tracer.create_proxy("call_module", _path_in(tracer, self), args, kwargs)

    # Each class gets code of its own: torch.compile counts recompilations by code, and all blocks would share this.
    code = wrapped.__code__.replace(co_name=forward.__qualname__)
    own = types.FunctionType(code, wrapped.__globals__, forward.__name__, closure=wrapped.__closure__)
    return functools.wraps(forward)(own)


def _path_in(tracer: Any, block: nn.Module) -> str:
    """The name of `block` in what is traced; a block that is traced by itself becomes the child `block`."""
    if tracer.root is not block:
        return str(tracer.path_of_module(block))
    holder = nn.Module()
    holder.add_module("block", block)
    holder.training = block.training
    tracer.root = holder
    return "block"


class RepBlock(nn.Module):
    """A block that computes one convolution, and after `fuse()` is one.

    Subclasses implement `_fold()`; nothing else is needed for `repkern.reparameterize` to handle them.
    Attributes as in nn.Conv2d: in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode.
    stride, padding, dilation and padding_mode may be rewritten: the convolutions inside follow. So may those of all
    convolutions inside alike, which the block follows; ValueError in forward and `fuse()` when they disagree. The other
    attributes cannot change: ValueError. torch.fx's symbolic tracing takes a block as one module call.
    """

    #: Whether the block ends in a norm of its own (so one that follows it in the user's net is a second one).
    has_norm: bool = True
    #: A convolution inside a block may be of this class: it is folded with all it computes.
    _folds_whole = True
    #: The convolutions inside whose bias is folded.
    _biased: frozenset[str] = frozenset()
    #: Whether there are convolutions inside, which have a geometry of their own.
    _has_parts: bool = True
    #: What parameters were called in state_dicts of earlier versions -> the submodule that holds them now.
    _earlier_names: dict[str, str] = {}  # noqa: RUF012

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            cls.forward = _one_node(vars(cls)["forward"])  # type: ignore[method-assign]

    def __init__(self, geometry: Geometry, activation: nn.Module | None = None) -> None:
        nn.Module.__init__(self)
        self._take(geometry)
        if activation is not None and not isinstance(activation, nn.Module):
            raise TypeError(f"activation must be an nn.Module instance or None, got {activation!r}")
        self.activation = activation

    def _take(self, geometry: Geometry) -> None:
        """Have this geometry, in the attributes that nn.Conv2d has."""
        for name, value in zip(geometry._fields[:-1], geometry, strict=False):
            self.__dict__[name] = value
        self._geometry = geometry
        self._expected = expected(geometry)
        self._pad = geometry.pad
        reach = same_padding(geometry.kernel_size, geometry.dilation)
        # What the centre of the kernel sees beyond the input; negative: it sees less than the whole input.
        self._margin = (self._pad[0] - reach[0], self._pad[1] - reach[1])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _REWRITABLE:
            with contextlib.suppress(ValueError):  # where they disagree, the block's own attributes decide
                self._follow_parts()
            self._take(rewritten(self._geometry, **{name: value}))
            push(self, self._geometry)
        elif name in _FIXED and value != getattr(self, name):
            raise ValueError(
                f"{name} of a {type(self).__name__} is {getattr(self, name)} and cannot become {value!r}: its "
                "parameters are made for it; make a new block"
            )
        elif name not in _FIXED:
            super().__setattr__(name, value)

    def _settle(self) -> None:
        """Follow the convolutions inside where they were rewritten. ValueError when no geometry fits them all."""
        if not self._has_parts:
            return
        self._follow_parts()
        if self._adds_input and not self._keeps_positions:
            raise ValueError(
                f"{type(self).__name__} adds its input to the output, which needs stride 1 and padding = dilation * "
                f"(K // 2); now stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}, "
                f"kernel_size={self.kernel_size}"
            )

    def _follow_parts(self) -> None:
        followed = True
        for name, child in self._modules.items():
            if child is None or name not in ROLES:
                continue
            if isinstance(child, RepBlock):
                child._settle()
            followed = followed and not disagrees(name, child, self._expected)
        if not followed:
            self._take(agreed(self, self._geometry))
            push(self, self._geometry)

    @property
    def _adds_input(self) -> bool:
        """Whether there is an identity branch, for which the output's pixels must lie on the input's."""
        return False

    def _fold(self) -> KernelBias:
        """(weight, bias or None) of the equivalent convolution, differentiable where the block's parameters are."""
        raise NotImplementedError

    @property
    def _deployed_bias(self) -> bool:
        """Whether the plain convolution has a bias."""
        return True

    def equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """(weight [Co, Ci/g, K, K], bias [Co]) of the convolution this block computes in eval mode (activation aside).

        The bias is zeros where the block has none. Differentiable.
        """
        self._settle()
        if self._has_parts:
            require_foldable(self, self._biased)
        weight, bias = self._fold()
        return weight, weight.new_zeros(self.out_channels) if bias is None else bias

    def set_equivalent_kernel_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        """Change the block's parameters so that `equivalent_kernel_bias()` gives these, within rounding.

        weight [Co, Ci/g, K, K], bias [Co] or None (zeros). The branches keep their values; one of them takes the rest.
        """
        raise ValueError(f"{type(self).__name__} cannot start as a given convolution (preserve=True)")

    def adopt_norm(self, norm: nn.Module) -> bool:
        """Make `norm` this block's own last norm. False where the block's norms are of another kind."""
        return False

    def set_kernel_before_norm(self, weight: Tensor, bias: Tensor | None) -> None:
        """As `set_equivalent_kernel_bias`, for the convolution before an adopted norm."""
        raise NotImplementedError

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> RepBlock:
        """A fresh block in place of `conv`: its geometry, dtype and device, not its weights; and other `options`."""
        make: Callable[..., RepBlock] = cls
        return make(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The plain module with this block's function: nn.Conv2d, or `conv` and `activation` in an nn.Sequential.

        Same dtype, device and training flag; its parameters require gradients if any of the block's does.
        Batch norms are folded with their running statistics. The block itself is left as it is.
        """
        self._settle()
        if self._has_parts:
            require_foldable(self, self._biased)
        weight, bias = self._fold()
        trainable = any(parameter.requires_grad for parameter in self.parameters())
        conv = nn.utils.skip_init(
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self._deployed_bias,
            self.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=trainable)
        if self._deployed_bias:
            bias = weight.new_zeros(self.out_channels) if bias is None else bias
            conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=trainable)
        conv.train(self.training)
        after = self._after()
        if not after:
            return conv
        fused = nn.Sequential(OrderedDict(conv=conv, **after))
        fused.training = self.training
        return fused

    def _after(self) -> dict[str, nn.Module]:
        """What follows the convolution in the deployed form, by name and in order."""
        return {} if self.activation is None else {"activation": self.activation}

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """This block's convolution with the given weight."""
        self._check_input(x)
        if self.padding_mode == "zeros":
            return functional.conv2d(x, weight, bias, self.stride, self._pad, self.dilation, self.groups)
        return functional.conv2d(self._padded(x), weight, bias, self.stride, 0, self.dilation, self.groups)

    @property
    def _keeps_positions(self) -> bool:
        """Whether output pixel (h, w) lies under input pixel (h, w), so that the input itself can be a branch."""
        return self.in_channels == self.out_channels and self.stride == (1, 1) and self._margin == (0, 0)

    def _centre(self, x: Tensor) -> Tensor:
        """The pixels under the kernel's centre: what a 1x1 branch of stride `stride` reads."""
        height, width = self._margin
        if self._margin == (0, 0):
            return x
        if self.padding_mode == "zeros" or max(self._margin) <= 0:
            return functional.pad(x, (width, width, height, height))
        height, width = (self.dilation[at] * (self.kernel_size[at] // 2) for at in (0, 1))
        return functional.pad(self._padded(x), (-width, -width, -height, -height))

    def _padded(self, x: Tensor) -> Tensor:
        height, width = self._pad
        return functional.pad(x, (width, width, height, height), mode=self.padding_mode)

    def _check_input(self, x: Tensor) -> None:
        self._settle()
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: the input must be a tensor, got {type(x).__name__}")
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: the input must be [(N,) {self.in_channels}, H, W], got {tuple(x.shape)}"
            )

    def _activate(self, x: Tensor) -> Tensor:
        return x if self.activation is None else self.activation(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        named_as_now(state_dict, prefix, self, self._earlier_names)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """As nn.Conv2d prints itself."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0, 0):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return text


def rename_earlier(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state_dict of `model`, with the names of today for parameters that earlier versions called otherwise."""
    state = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, RepBlock):
            named_as_now(state, f"{name}." if name else "", module, module._earlier_names)
    return state
