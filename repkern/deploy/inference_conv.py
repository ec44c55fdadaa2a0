"""InferenceConv2d: convolution, activation and residual in one call, by the method that was fastest here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repkern.deploy._methods import FORMS, METHODS, Call, ConvSpec, Maps, activate, torch_conv
from repkern.ops._library import _is_ordinary

if TYPE_CHECKING:
    from repkern.deploy._choice import Chooser

__all__ = ["InferenceConv2d"]

_MAX_CALLS = 256  # prepared calls that a layer keeps, one for each shape of its input


class InferenceConv2d(nn.Module):
    """activation(conv2d(x, weight, bias) + residual) for inference; what `optimize_for_inference` puts in a model.

    x [N, C, H, W] and residual, None or as the result. The state_dict holds weight [K, C/g, kh, kw] and bias as
    nn.Conv2d's; inside, the weights have the form that the chosen method reads, so `weight` is a copy, to be changed by
    load_state_dict only. Other inputs than the method can take run as torch's convolution.
    """

    bias: nn.Parameter | None
    plain: Tensor | None
    packed: Tensor | None

    def __init__(self, spec: ConvSpec, weight: Tensor, bias: Tensor | None, *, channels_last: bool = False) -> None:
        super().__init__()
        self.spec = spec
        # torch gives a map the order of its weights, whatever the input's: that order is kept through every change.
        own = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        self._channels_last = channels_last or own
        self.form = "plain"
        self.method = "torch"
        self.methods: dict[torch.Size, str] = {}
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("plain", weight.detach().contiguous(memory_format=self._order), persistent=False)
        self.register_buffer("packed", None, persistent=False)
        self._opaque: Tensor | None = None  # what oneDNN packs is no strided tensor and can be no buffer
        self._dtype = weight.dtype
        self._calls: dict[Any, Call] = {}
        self.chooser: Chooser | None = None
        self.training = False

    @property
    def _order(self) -> torch.memory_format:
        return torch.channels_last if self._channels_last else torch.contiguous_format

    @property
    def weight(self) -> Tensor:
        """[K, C/g, kh, kw]; a copy where the layer keeps another form."""
        return self.kernel()

    def kernel(self) -> Tensor:
        """The weight as that of a convolution."""
        if self.plain is not None:
            return self.plain
        unpack = FORMS[self.form].unpack
        assert unpack is not None
        assert self.packed is not None
        return unpack(self.packed, self.spec).to(self._dtype)

    @torch.no_grad()
    def use(self, form: str, method: str, methods: Mapping[torch.Size, str] | None = None) -> None:
        """Keep the weights in `form`, and compute by `methods` (input shape -> name), for other shapes by `method`."""
        weight = self.kernel()
        self._calls = {}
        self.form, self.method, self.methods = form, method, dict(methods or {})
        self._set_weight(weight)

    def _set_weight(self, weight: Tensor) -> None:
        form = FORMS[self.form]
        packed = None if self.form == "plain" else form.pack(weight, self.spec)
        opaque = packed is not None and packed.layout is not torch.strided
        keep = form.unpack is None or packed is None
        self.plain = weight.contiguous(memory_format=self._order) if keep else None
        self._opaque, self.packed = (packed, None) if opaque else (None, packed)
        self._calls = {}

    def _weights(self) -> Tensor:
        """Those that the method reads."""
        for tensor in (self.packed, self._opaque, self.plain):
            if tensor is not None:
                return tensor
        raise AssertionError("a layer always has weights")

    def hold_packed(self, packed: Tensor) -> None:
        """Keep these instead of the packed weights, which they equal."""
        self.packed = packed
        self._calls = {}

    def held_weights(self) -> list[Tensor]:
        """All that the layer keeps of its weights."""
        return [tensor for tensor in (self.plain, self.packed, self._opaque) if tensor is not None]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] -> [N, K, H', W'], in the memory format of x."""
        if torch.compiler.is_compiling():
            return self._watched(x, residual)
        if not isinstance(x, Tensor):
            raise TypeError(f"InferenceConv2d: the input must be a tensor, got {type(x).__name__}")
        if self.chooser is not None:
            return self.chooser(self, x, residual)
        if torch._C._get_tracing_state() is not None or not _is_ordinary((x, residual)):
            transformed = torch._C._are_functorch_transforms_active()  # the ops have no rules for vmap and its kin
            return self.by_torch(x, residual) if transformed else self._watched(x, residual)
        key: Any = (x.shape, x.stride(), x.dtype, x.device)
        if residual is not None:
            key = (key, residual.shape, residual.dtype, residual.device)
        call = self._calls.get(key)
        if call is None:
            call = self._prepare(key, x, residual)
        return call(x, residual)

    def _prepare(self, key: Any, x: Tensor, residual: Tensor | None) -> Call:
        calls, method = self._calls, self._method_for(x, residual)
        if method is None:
            return self.by_torch
        call = METHODS[method].prepare(self.spec, self._weights(), self.bias, x, residual)
        if len(calls) >= _MAX_CALLS:
            calls.clear()
        calls[key] = call
        return call

    def _method_for(self, x: Tensor, residual: Tensor | None) -> str | None:
        """What runs on these inputs; None: only torch's convolution, which also has the errors for wrong inputs."""
        method = self.methods.get(x.shape) or self._nearest(x)
        fits = (
            x.dim() == 4
            and x.numel() > 0
            and x.shape[1] == self.spec.in_channels
            and x.dtype == self._dtype
            and x.device == self._weights().device
            and min(shape := self.spec.output_shape(x.shape)) > 0
            and (residual is None or (residual.shape == shape and residual.dtype == x.dtype))
            and (residual is None or residual.device == x.device)
        )
        return method if fits and METHODS[method].why_not(self.spec, Maps.of(x)) is None else None

    def _nearest(self, x: Tensor) -> str:
        """For a shape that was not measured: the choice for the known one with the nearest number of elements."""
        known = min(self.methods, key=lambda shape: abs(math.log(shape.numel() / max(1, x.numel()))), default=None)
        return self.method if known is None else self.methods[known]

    def _watched(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Through torch's dispatcher, where something looks at every operation: compilers, modes, other transforms."""
        usable = self.packed is not None and x.dtype == self._dtype and x.dim() == 4
        usable = usable and x.shape[1] == self.spec.in_channels
        if usable and residual is not None:
            usable = residual.dtype == x.dtype and residual.shape == self.spec.output_shape(x.shape)
        if not usable or self.packed is None:
            return self.by_torch(x, residual)
        return METHODS[self.method].traced(self.spec, self.packed, self.bias, x, residual)

    def by_torch(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same by torch's convolution, for any input that it takes."""
        return activate(self.spec.activation, torch_conv(self.spec, x, self.kernel(), self.bias), residual)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unknown: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unknown, error_msgs)
        key = f"{prefix}weight"
        unexpected_keys += [name for name in unknown if name != key]
        weight = state_dict.get(key)
        if weight is None:
            if strict:
                missing_keys.append(key)
        elif tuple(weight.shape) != self.spec.weight_shape:
            error_msgs.append(
                f"size mismatch for {key}: copying a param with shape {weight.shape} from checkpoint, "
                f"the shape in current model is {torch.Size(self.spec.weight_shape)}."
            )
        else:
            like = self._weights()
            plain = torch.empty(weight.shape, dtype=self._dtype, device=like.device, memory_format=self._order)
            self._set_weight(plain.copy_(weight))

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceConv2d:
        """A packed form belongs to one dtype and device: after another `to` the layer is torch's convolution."""
        like = self._weights()
        probe = torch.empty(0, dtype=self._dtype, device=like.device)
        moved = fn(probe)
        self._calls = {}
        if self.form != "plain" and (moved.dtype, moved.device) == (probe.dtype, probe.device):
            return self
        self.use("plain", "torch")
        self._dtype = moved.dtype
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """With plain weights: what is packed is of this machine and this version of repkern."""
        buffers = self._buffers | {"plain": self.kernel(), "packed": None}
        return self.__dict__ | {"_buffers": buffers, "_calls": {}, "_opaque": None, "chooser": None}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        weight = self.kernel()
        here = Maps(self._dtype, weight.device, self._channels_last)
        if METHODS[self.method].why_not(self.spec, here) is not None:
            self.form, self.method, self.methods = "plain", "torch", {}
        self._set_weight(weight)

    def extra_repr(self) -> str:
        """Geometry and method."""
        spec = self.spec
        parts = [f"{spec.in_channels}, {spec.out_channels}, kernel_size={spec.kernel_size}, stride={spec.stride}"]
        parts += [f"padding={spec.padding}, dilation={spec.dilation}, groups={spec.groups}"]
        return ", ".join([*parts, f"activation={spec.activation}, method={self.method!r}"])
