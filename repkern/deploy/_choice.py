"""Which method each layer uses: checked against torch's result, timed, and fitted into the memory that is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from repkern.deploy._cache import TimingCache, hardware
from repkern.deploy._methods import FORMS, METHODS, Call, Maps
from repkern.deploy._timing import time_calls
from repkern.deploy.inference_conv import InferenceConv2d
from repkern.ops._select import choose as backend_of
from repkern.ops.winograd_conv2d.matrices import matrices

__all__ = ["ACCURACIES", "Chooser", "Record", "Rules", "allowed_error", "decide"]

# Relative L2 difference of a layer's result from torch's, by accuracy and dtype; half precision against float32.
_ALLOWED: dict[str, dict[torch.dtype, float]] = {
    "exact": {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4},
    "default": {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4},
    "fast": {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2.5e-3},
}
_TF32 = 2e-3  # ten bits of significand in both operands
_TILES = {"exact": (0,), "default": (0, 2, 4, 5), "fast": (0, 2, 4, 5, 6)}
ACCURACIES = tuple(_ALLOWED)
# Another method than torch's must be faster by more than two timings of one method differ.
_WORTH_IT = 0.98


def allowed_error(accuracy: str, dtype: torch.dtype, precision: str) -> float:
    """Relative L2 difference from torch's result that a layer may have."""
    limit = _ALLOWED[accuracy].get(dtype, 1e-12)
    return max(limit, _TF32) if precision == "tf32" else limit


@dataclass(frozen=True)
class Rules:
    """The options of `optimize_for_inference` that decide what may be chosen."""

    accuracy: str = "default"
    memory: float | None = 1.5
    methods: Collection[str] | None = None

    def allows(self, name: str) -> str | None:
        """None where the method may be used, else why not."""
        if name == "torch":
            return None
        if self.methods is not None and name not in self.methods:
            return "not among `methods`"
        if METHODS[name].tile not in _TILES[self.accuracy]:
            return f"accuracy={self.accuracy!r} excludes it"
        return None


@dataclass
class Record:
    """What was found about one layer. By input shape: calls, times; by method: errors, bytes, why it is not used."""

    calls: dict[torch.Size, int] = field(default_factory=dict)
    seconds: dict[torch.Size, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    bytes_of: dict[str, int] = field(default_factory=dict)
    map_bytes: int = 0  # of input and output together, at the largest shape

    def usable(self) -> list[str]:
        """Methods that are right and were timed for every shape."""
        timed = [set(times) for times in self.seconds.values()]
        return [name for name in METHODS if name not in self.reasons and all(name in names for names in timed)]


class Chooser:
    """Called by the layers in place of their own forward while the example runs; returns torch's result."""

    def __init__(self, rules: Rules, cache: TimingCache, step: Callable[[], None] = lambda: None) -> None:
        self.records: dict[InferenceConv2d, Record] = {}
        self._rules = rules
        self._cache = cache
        self._step = step

    def __call__(self, layer: InferenceConv2d, x: Tensor, residual: Tensor | None) -> Tensor:
        """Examine the layer on this input."""
        result = layer.by_torch(x, residual)
        if x.dim() == 4 and x.numel() and result.numel() and x.dtype.is_floating_point:
            record = self.records.setdefault(layer, Record())
            known = x.shape in record.calls
            record.calls[x.shape] = record.calls.get(x.shape, 0) + 1
            record.map_bytes = max(record.map_bytes, (x.numel() + result.numel()) * x.element_size())
            if not known:
                self._examine(layer, x, residual, result, record)
        self._step()
        return result

    def _examine(
        self, layer: InferenceConv2d, x: Tensor, residual: Tensor | None, result: Tensor, record: Record
    ) -> None:
        calls = self._right_calls(layer, x, residual, result, record)
        key = _key(layer, x, residual)
        known = self._cache.get(key)
        if not set(calls) <= set(known):
            bound: Mapping[str, Callable[[Tensor], Tensor]] = {
                name: _bind(call, residual) for name, call in calls.items()
            }
            known = known | time_calls(bound, x)
            self._cache.put(key, known)
        record.seconds[x.shape] = {name: known[name] for name in calls}

    def _right_calls(
        self, layer: InferenceConv2d, x: Tensor, residual: Tensor | None, result: Tensor, record: Record
    ) -> dict[str, Call]:
        """The methods that can run here and whose result is right; why the others are not goes into the record."""
        weight, spec, maps = layer.kernel(), layer.spec, Maps.of(x)
        exact = _exact(layer, x, residual) if x.dtype in (torch.bfloat16, torch.float16) else result
        limit = allowed_error(self._rules.accuracy, x.dtype, spec.precision)
        packed: dict[str, Tensor] = {}
        calls: dict[str, Call] = {}
        for name, method in METHODS.items():
            reason = self._rules.allows(name) or method.why_not(spec, maps)
            if reason is None and residual is not None and residual.shape != result.shape and name != "torch":
                reason = "the residual has another shape than the result"
            if reason is None and method.tile and _may_overflow(x, method.tile):
                reason = "fp16 could overflow in the transform"
            if reason is None and method.form not in packed:
                packed[method.form] = FORMS[method.form].pack(weight, spec)
                if not _comes_back(weight, packed[method.form], layer, method.form):
                    reason = "the weights would not come back exactly"
            if reason is None:
                calls[name] = method.prepare(spec, packed[method.form], layer.bias, x, residual)
                record.bytes_of[name] = _bytes(weight, packed[method.form], method.form)
                if name != "torch":
                    error = _difference(calls[name](x, residual), exact)
                    record.errors[name] = max(error, record.errors.get(name, 0.0))
                    reason = None if error <= limit else _too_far(error, limit)
            if reason is not None:
                calls.pop(name, None)
                record.reasons[name] = reason
        return calls


def _comes_back(weight: Tensor, packed: Tensor, layer: InferenceConv2d, form: str) -> bool:
    unpack = FORMS[form].unpack
    return unpack is None or torch.equal(unpack(packed, layer.spec).to(weight.dtype), weight)


def _bind(call: Call, residual: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: call(x, residual)


def _exact(layer: InferenceConv2d, x: Tensor, residual: Tensor | None) -> Tensor:
    """The layer in float32, with the weights it has."""
    bias = None if layer.bias is None else layer.bias.float()
    wide = InferenceConv2d(layer.spec, layer.kernel().float(), bias)
    return wide.by_torch(x.float(), None if residual is None else residual.float())


def _difference(got: Tensor, exact: Tensor) -> float:
    """Relative L2; infinite where got is not finite."""
    difference, norm = float((got.double() - exact.double()).norm()), float(exact.double().norm())
    if not difference < float("inf"):
        return float("inf")
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def _too_far(error: float, limit: float) -> str:
    if error == float("inf"):
        return "its result is not finite or torch's is zero"
    return f"relative error {error:.1e}, the limit is {limit:.1e}"


def _may_overflow(x: Tensor, tile: int) -> bool:
    """Whether an input eight times as large as this one could leave fp16's range inside a GPU's transform."""
    if x.dtype is not torch.float16 or not x.is_cuda:
        return False
    gain = float(matrices(tile).b.abs().sum(1).max()) ** 2
    return not 8 * gain * float(x.abs().max()) < torch.finfo(torch.float16).max


def _bytes(weight: Tensor, packed: Tensor, form: str) -> int:
    plain = weight.numel() * weight.element_size()
    if form == "plain":
        return plain
    strided = packed.layout is torch.strided
    size = packed.numel() * packed.element_size() if strided else plain
    return size if FORMS[form].unpack is not None else size + plain


def _key(layer: InferenceConv2d, x: Tensor, residual: Tensor | None) -> str:
    import repkern

    spec = layer.spec
    parts: Sequence[Any] = (
        "conv2d", list(x.shape), spec.out_channels, spec.kernel_size, spec.stride, spec.padding, spec.dilation,
        spec.groups, spec.activation, spec.precision, spec.linear, residual is not None, layer.bias is not None,
        str(x.dtype), x.is_contiguous(memory_format=torch.channels_last), x.is_contiguous(), torch.get_num_threads(),
        hardware(x.device), backend_of("winograd_conv2d_packed", x.device.type), repkern.__version__, torch.__version__,
    )  # fmt: skip
    return json.dumps(parts, separators=(",", ":"))


@dataclass(frozen=True)
class _Option:
    """One form for one layer, with the best of its methods for every shape."""

    form: str
    method: str
    methods: Mapping[torch.Size, str]
    seconds: float
    size: int


def _options(record: Record, skip: Collection[str]) -> list[_Option]:
    """Forms by time, the fastest first; torch's own wins where the others gain nothing."""
    usable = [name for name in record.usable() if name not in skip]
    options = []
    for form in dict.fromkeys(METHODS[name].form for name in usable):
        names = [name for name in usable if METHODS[name].form == form]
        best: dict[torch.Size, str] = {}
        total, longest = 0.0, (0.0, names[0])
        for shape, count in record.calls.items():
            times = {name: record.seconds[shape][name] * (1.0 if name != "torch" else _WORTH_IT) for name in names}
            best[shape] = min(times, key=lambda name: times[name])
            spent = count * times[best[shape]]
            total, longest = total + spent, max(longest, (spent, best[shape]))
        options.append(_Option(form, longest[1], best, total, record.bytes_of[names[0]]))
    return sorted(options, key=lambda option: option.seconds)


def decide(
    records: Mapping[InferenceConv2d, Record], rules: Rules, skip: Collection[str] = ()
) -> dict[InferenceConv2d, bool]:
    """Give every layer the fastest form, so that memory stays within rules.memory times what torch needs.

    That is the plain weights and the largest input and output of one layer, which all methods have alike. Where it is
    exceeded, the layers that lose the least time per byte step back. skip: methods not to use.
    Returns whether each layer stepped back.
    """
    options = {layer: _options(record, skip) for layer, record in records.items()}
    chosen = {layer: choices[0] for layer, choices in options.items()}
    plain = sum(record.bytes_of["torch"] for record in records.values())
    maps = max((record.map_bytes for record in records.values()), default=0)
    allowed = float("inf") if rules.memory is None else rules.memory * (plain + maps) - maps
    stepped = dict.fromkeys(records, False)
    while sum(option.size for option in chosen.values()) > allowed:
        steps = [
            ((other.seconds - chosen[layer].seconds) / (chosen[layer].size - other.size), at, layer, other)
            for at, (layer, choices) in enumerate(options.items())
            for other in choices
            if other.size < chosen[layer].size
        ]
        if not steps:
            break
        _, _, layer, other = min(steps, key=lambda step: step[:2])
        chosen[layer], stepped[layer] = other, True
    for layer, option in chosen.items():
        layer.use(option.form, option.method, option.methods)
    return stepped
