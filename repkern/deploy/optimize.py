"""optimize_for_inference: a trained model -> the fastest module for its inference on this machine."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repkern.deploy._arena import gather_weights
from repkern.deploy._cache import TimingCache
from repkern.deploy._choice import ACCURACIES, Chooser, Rules, decide
from repkern.deploy._convertible import why_not_conv
from repkern.deploy._describe import describe
from repkern.deploy._fuse import Untraceable, fuse_graph, keeps_meaning_channels_last, trace
from repkern.deploy._methods import METHODS
from repkern.deploy._modulewise import convert_modules
from repkern.deploy._progress import progress_of
from repkern.deploy.convert import quiet_about_conversion
from repkern.deploy.inference_conv import InferenceConv2d
from repkern.deploy.inference_model import InferenceModel, in_order
from repkern.deploy.report import OptimizeReport
from repkern.nn import reparameterize
from repkern.nn._surgery import copied_model
from repkern.nn._trees import floating_tensors, leaves, map_tensors, same_structure
from repkern.nn.verify import Call, Example, call_of

__all__ = ["PRECISIONS", "optimize_for_inference"]

#: precision -> the dtype of all maps and weights inside; None: the model's own.
PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "tf32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# What fusing may change, relative to the largest output: a wrong fusion changes far more, rounding far less.
_SAME = {torch.float32: 1e-3, torch.float64: 1e-9, torch.bfloat16: 0.1, torch.float16: 0.02}
# Relative to the largest output, with the chosen methods: the end-to-end promise in float32.
_END_TO_END = {"exact": 1e-5, "default": 1e-5, "fast": 1e-4}


def optimize_for_inference(
    model: nn.Module,
    example_inputs: Example,
    *,
    precision: str = "fp32",
    accuracy: str = "default",
    memory: float | None = 1.5,
    methods: Collection[str] | None = None,
    cache: bool = True,
    progress: bool | None = None,
) -> InferenceModel:
    """A copy of `model` that computes the same faster, on the device it is on; any model, with or without our blocks.

    Blocks are reparameterized; BatchNorm, ReLU, ReLU6, SiLU, Hardswish and the sum with a shortcut go into the
    convolutions before them; maps are kept in channels_last. Each convolution then uses what was fastest, for its shape
    while example_inputs runs, among torch, oneDNN's fused operators, Winograd F2, F4 and F5, Winograd of stride 2, and
    direct convolution. What is not understood stays as it is. The result has `report` (print it), the state_dict of the
    plain model, can be copied, pickled, compiled and called by several threads, and takes other input sizes than the
    example's.

    example_inputs: a tensor, a tuple of arguments or a dictionary of keyword arguments, as the model will see
    them, also in lists, dictionaries, NamedTuples and dataclasses: times and checks are made with them.
    precision: "fp32" (strict), "tf32" (GPU), "bf16" or "fp16" (weights and maps inside; outputs are float32 again).
    accuracy: what a layer may differ from torch's result, relative L2 in float32: "exact" 2e-6 without Winograd,
    "default" 5e-6, "fast" 2e-5 with F6. The outputs may differ by 1e-5 of the largest ("fast" 1e-4), else methods are
    excluded until they do not; where torch's own rounding is larger, that decides.
    memory: weights and the largest maps of a layer, in multiples of torch's; None: any. methods: only these and torch.
    cache: times are kept in $REPKERN_CACHE_DIR (default: the user's cache folder). progress: None shows a bar on a
    terminal.

    TypeError and ValueError for arguments that cannot be; what the model raises on the example comes through.
    """
    call = call_of(example_inputs)
    _check(model, call, precision, accuracy, memory, methods)
    with torch.no_grad(), _strict(precision):
        base = _plain_copy(model, precision)
        device, dtype = _place(base, call)
        if precision == "tf32" and device.type != "cuda":
            raise ValueError(f"precision='tf32' is of GPUs, the model is on {device.type}: use 'fp32' or 'bf16'")
        inner = PRECISIONS[precision] if dtype == torch.float32 else None
        report = OptimizeReport(precision, accuracy, str(device), torch.get_num_threads())
        wanted = call(base)
        if inner is not None:
            base = base.to(inner)
        made = _make(base, call, wanted, inner, report)
        rules = Rules(accuracy, memory, None if methods is None else frozenset(methods))
        _choose(made, call, wanted, rules, TimingCache(cache), progress)
    return made.model


class _Made(NamedTuple):
    model: InferenceModel
    layers: dict[InferenceConv2d, list[str]]
    difference: float


def _check(model: Any, call: Call, precision: str, accuracy: str, memory: Any, methods: Collection[str] | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_for_inference: the model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, InferenceModel):
        raise ValueError("optimize_for_inference: the model is optimized already; give the one it was made from")
    for name, value, known in (("precision", precision, PRECISIONS), ("accuracy", accuracy, ACCURACIES)):
        if value not in known:
            raise ValueError(f"optimize_for_inference: {name} must be one of {', '.join(known)}, got {value!r}")
    if memory is not None and not (isinstance(memory, int | float) and memory >= 1):
        raise ValueError(f"optimize_for_inference: memory must be at least 1 or None, got {memory!r}")
    if isinstance(methods, str):
        raise TypeError(f"optimize_for_inference: methods must be a collection of names, got the string {methods!r}")
    unknown = sorted(set(methods or ()) - set(METHODS))
    if unknown:
        raise ValueError(
            f"optimize_for_inference: there is no method {', '.join(unknown)}; there are {', '.join(METHODS)}"
        )
    tensors = list(floating_tensors(call))
    if not tensors:
        raise ValueError("optimize_for_inference: example_inputs hold no floating-point tensor")
    for tensor in tensors:
        if tensor.numel() == 0:
            raise ValueError(
                f"optimize_for_inference: example_inputs must not be empty, got a tensor {tuple(tensor.shape)}"
            )
        if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
            raise ValueError("optimize_for_inference: example_inputs hold NaN or infinite values")


def _plain_copy(model: nn.Module, precision: str) -> nn.Module:
    with quiet_about_conversion():
        return reparameterize(model).eval().requires_grad_(False)


def _place(model: nn.Module, call: Call) -> tuple[torch.device, torch.dtype]:
    """Where and in what the model computes: as its first floating parameter or buffer, else as the example."""
    own = [*model.parameters(), *model.buffers(), *floating_tensors(call)]
    first = next(tensor for tensor in own if tensor.is_floating_point())
    wrong = [tensor for tensor in floating_tensors(call) if tensor.device != first.device]
    if wrong:
        raise ValueError(
            f"optimize_for_inference: the model is on {first.device} but example_inputs are on {wrong[0].device}"
        )
    if first.device.type == "meta":
        raise ValueError("optimize_for_inference: the model has no values (it is on the meta device)")
    return first.device, first.dtype


@contextlib.contextmanager
def _strict(precision: str) -> Iterator[None]:
    """While choosing on a GPU, the ops see what the precision says."""
    flag: Any = torch.backends.cuda.matmul
    before = flag.allow_tf32
    flag.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        flag.allow_tf32 = before


def _make(base: nn.Module, call: Call, wanted: Any, inner: torch.dtype | None, report: OptimizeReport) -> _Made:
    """The model with its layers exchanged, all computed by torch yet: of the ways to do it, the first that is right."""
    dtype = inner or next((tensor.dtype for tensor in floating_tensors([wanted])), torch.float32)
    failures: list[str] = []
    for traced, option in ((True, True), (True, False), (False, True), (False, False)):
        attempt = copy.copy(report)
        attempt.notes = list(failures)
        try:
            made = _attempt(base, call, inner, attempt, traced, option)
            difference = _difference(call(made.model), wanted)
        except Exception as problem:  # whatever user code does with what it was not written for
            text = str(problem).strip().partition("\n")[0]
            failures.append(_failure(traced, option, text if isinstance(problem, Untraceable) else repr(problem)))
            continue
        if difference <= _SAME.get(dtype, 1e-3):
            return made._replace(difference=difference)
        failures.append(_failure(traced, option, f"outputs differ by {difference:.1e}"))
    report.notes = [*failures, "nothing was exchanged"]
    return _Made(_wrapped(copied_model(base), inner, report), {}, 0.0)


def _failure(traced: bool, option: bool, why: str) -> str:
    if traced:
        return f"not as one graph{' in channels_last' if option else ''}: {why}"
    return f"not with what follows convolutions in nn.Sequential fused: {why}" if option else f"not at all: {why}"


def _attempt(
    base: nn.Module, call: Call, inner: torch.dtype | None, report: OptimizeReport, traced: bool, option: bool
) -> _Made:
    model = copied_model(base)
    inside: Call = map_tensors(lambda t: t.to(inner) if inner and t.is_floating_point() else t, call)
    if not traced:
        body, layers = convert_modules(model, report.precision, neighbours=option)
        return _Made(_wrapped(body, inner, report), layers, 0.0)
    if isinstance(model, nn.Conv2d):
        raise Untraceable("it is one module")
    graph = trace(model, inside)
    if option and not keeps_meaning_channels_last(graph):
        raise Untraceable("it depends on the order of maps in memory")
    parameters = [(p.name, p.default) for p in inspect.signature(model.forward).parameters.values()]
    layers = fuse_graph(graph, in_order(parameters, *inside), report.precision, option)
    report.traced, report.channels_last = True, option
    return _Made(_wrapped(graph, inner, report, parameters), layers, 0.0)


def _wrapped(
    body: nn.Module, inner: torch.dtype | None, report: OptimizeReport, parameters: Sequence[tuple[str, Any]] = ()
) -> InferenceModel:
    names = {module: name for name, module in body.named_modules()}
    report.kept = {
        name: why_not_conv(module) or "it is called in a way that is not understood"
        for module, name in names.items()
        if isinstance(module, nn.Conv2d)
    }
    return InferenceModel(body.eval(), report, parameters=parameters, dtype=inner)


def _difference(got: Any, wanted: Any) -> float:
    """Of nested outputs, relative to the largest value of each; infinite where they are not alike."""
    if not same_structure(got, wanted):
        return float("inf")
    pairs = zip(leaves(got), leaves(wanted), strict=True)
    return max((_difference_of_leaves(one, other) for one, other in pairs), default=0.0)


def _difference_of_leaves(one: Any, other: Any) -> float:
    if not isinstance(other, Tensor):
        return 0.0 if one is other or one == other else float("inf")
    if not isinstance(one, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    finite = torch.isfinite(other) if other.is_floating_point() else torch.ones_like(other, dtype=torch.bool)
    one, other = one[finite].double(), other[finite].double()
    if not other.numel():
        return 0.0
    largest, difference = float(other.abs().max()), float((one - other).abs().max())
    if difference != difference:
        return float("inf")
    return difference / largest if largest else difference


def _choose(made: _Made, call: Call, wanted: Any, rules: Rules, cache: TimingCache, progress: bool | None) -> None:
    model, layers = made.model, made.layers
    report = model.report
    with progress_of(len(layers), progress) as step:
        chooser = Chooser(rules, cache, step)
        for layer in layers:
            layer.chooser = chooser
        try:
            call(model)
        finally:
            for layer in layers:
                layer.chooser = None
    cache.save()
    limit = max(_END_TO_END[rules.accuracy], 8 * made.difference) if report.precision == "fp32" else float("inf")
    skip: list[str] = []
    while True:
        stepped = decide(chooser.records, rules, skip)
        report.difference = _difference(call(model), wanted)
        used = {name for layer in layers for name in (layer.method, *layer.methods.values())}
        tile = max((METHODS[name].tile for name in used), default=0)
        if report.difference <= limit or not tile:
            break
        skip += [name for name, method in METHODS.items() if method.tile == tile]
        report.notes.append(f"Winograd F{tile} is not used: outputs differed by {report.difference:.1e}")
    describe(model, layers, chooser.records, stepped, skip)
    gather_weights(layers)
