"""sensitivity: what INT8 costs in every layer, and why: the spread of its weights, centre against surround."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repkern.deploy.quantize import images_of, observe
from repkern.deploy.quantize_torchao import Scheme, torchao_module

__all__ = [
    "KernelSpread",
    "LayerSensitivity",
    "SensitivityReport",
    "kernel_spread",
    "sensitivity",
    "sensitivity_of",
    "sqnr",
]

_LAYERS = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
_MOST_DB = 200.0  # what an exact output counts as


@dataclass(frozen=True)
class KernelSpread:
    """Standard deviations of a weight, as Table 11 of RepOptimizers (paper 2205.15242) has them.

    centre, surround: of the middle of KxK kernels and of the rest; None for other weights. largest: absolute value.
    channel_ratio: the largest weight of the widest output channel to that of the median one; per-tensor scales lose
    its base-2 logarithm in bits.
    """

    overall: float
    centre: float | None
    surround: float | None
    largest: float
    channel_ratio: float


@dataclass(frozen=True)
class LayerSensitivity:
    """One convolution or linear layer. SQNRs are in decibel: 10 log10 of signal power over error power.

    own: of its output when its input and weight are quantized, nothing else. network: of the network's output then.
    accumulated: of its output when everything is quantized.
    """

    name: str
    shape: tuple[int, ...]
    own: float
    network: float
    accumulated: float
    spread: KernelSpread


@dataclass(frozen=True)
class SensitivityReport:
    """All layers in the order they run, and the SQNR of the network's output when everything is quantized."""

    layers: tuple[LayerSensitivity, ...]
    network: float
    scheme: Scheme

    def worst(self, count: int = 5) -> list[LayerSensitivity]:
        """The layers whose quantization alone hurts the network's output most, the worst first."""
        return sorted(self.layers, key=lambda layer: layer.network)[:count]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "network": self.network,
            "scheme": asdict(self.scheme),
            "layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
        }

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=5)
        lines = [
            f"SQNR of the output {self.network:.1f} dB",
            f"{'layer':<{width}}  {'own':>6} {'alone':>6} {'accum.':>6}  {'std':>8} {'centre':>8} {'surround':>8}",
        ]
        for layer in self.layers:
            spread = layer.spread
            parts = [f"{value:8.4f}" if value is not None else f"{'-':>8}" for value in (
                spread.overall, spread.centre, spread.surround,
            )]  # fmt: skip
            numbers = f"{layer.own:6.1f} {layer.network:6.1f} {layer.accumulated:6.1f}"
            lines.append(f"{layer.name:<{width}}  {numbers}  {' '.join(parts)}")
        return "\n".join(lines)


def sensitivity(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    weights: str = "per_channel",
    weight_bits: int = 8,
    progress: Callable[[str], None] = lambda layer: None,
) -> SensitivityReport:
    """Quantize `model` as `quantize` would, all of it and layer by layer, and compare on the last calibration batch.

    Arguments and errors: as `quantize`. progress: called with the name of each layer before it is measured. The
    observers are those of the real quantization, and rounding in all of them computes what the INT8 program computes.
    """
    scheme = Scheme(weights, weight_bits)
    batches = list(calibration)
    graph, _ = observe(model, batches, scheme)
    (images,) = images_of(batches[-1:])
    return sensitivity_of(graph, images, scheme, progress)


def sensitivity_of(
    graph: torch.fx.GraphModule, images: Tensor, scheme: Scheme, progress: Callable[[str], None] = lambda layer: None
) -> SensitivityReport:
    """The report on a graph that `observe` made; the graph stays as it is."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function" and node.target in _LAYERS]
    truth = _Rounding(graph, (), everywhere=False).outputs(images)
    rounded = _Rounding(graph, (), everywhere=True).outputs(images)
    layers = []
    for node in nodes:
        name = _module_name(node)
        progress(name)
        alone = _Rounding(graph, (node,), everywhere=False).outputs(images)
        weight = _weight(graph, node)
        layers.append(
            LayerSensitivity(
                name=name,
                shape=tuple(weight.shape),
                own=sqnr(truth[node.name], alone[node.name]),
                network=sqnr(truth[""], alone[""]),
                accumulated=sqnr(truth[node.name], rounded[node.name]),
                spread=kernel_spread(weight),
            )
        )
    return SensitivityReport(tuple(layers), sqnr(truth[""], rounded[""]), scheme)


def sqnr(signal: Tensor, approximation: Tensor) -> float:
    """10 log10 (sum of signal^2 / sum of their difference^2), at most 200 and, for a zero signal, at least -200."""
    error = (signal.double() - approximation.double()).square().sum().item()
    power = signal.double().square().sum().item()
    if error == 0:
        return _MOST_DB
    return -_MOST_DB if power == 0 else max(-_MOST_DB, min(_MOST_DB, 10 * math.log10(power / error)))


def kernel_spread(weight: Tensor) -> KernelSpread:
    """The spread of a weight [Co, ...]; of [Co, Ci/g, K, K] with odd K > 1 also by place."""
    weight = weight.detach().double()
    centre = surround = None
    if weight.dim() == 4 and weight.shape[2] == weight.shape[3] > 1 and weight.shape[2] % 2 == 1:
        middle = weight.shape[2] // 2
        is_centre = torch.zeros(weight.shape[2:], dtype=torch.bool)
        is_centre[middle, middle] = True
        centre = _deviation(weight[:, :, is_centre])
        surround = _deviation(weight[:, :, ~is_centre])
    channels = weight.flatten(1).abs().amax(1)
    median = channels.median().item()
    return KernelSpread(
        overall=_deviation(weight),
        centre=centre,
        surround=surround,
        largest=channels.max().item(),
        channel_ratio=channels.max().item() / median if median > 0 else math.inf,
    )


def _deviation(values: Tensor) -> float:
    return values.std(unbiased=False).item()


class _Rounding(torch.fx.Interpreter):
    """Runs a graph with calibrated observers, rounding in all of them, or only what enters the layers `alone`."""

    def __init__(self, graph: torch.fx.GraphModule, alone: tuple[torch.fx.Node, ...], *, everywhere: bool) -> None:
        super().__init__(graph)
        self._alone = alone
        self._everywhere = everywhere
        self._kept: dict[str, Tensor] = {}

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Of every layer, by the name of its node, and of the network, under ""."""
        with torch.no_grad():
            result = self.run(images)
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self._kept[""] = torch.cat([leaf.flatten() for leaf in leaves])
        return self._kept

    def run_node(self, n: torch.fx.Node) -> Any:
        """One node; observers either round or let pass, and learn nothing."""
        if n.op == "call_module" and (observer := _observer(self.module, n)) is not None:
            value = self.fetch_args_kwargs_from_env(n)[0][0]
            return _rounded(value, observer) if self._everywhere else value
        if n in self._alone:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            entering = [
                _rounded(value, observer) if (observer := _observer(self.module, source)) is not None else value
                for source, value in zip(n.args, args, strict=True)
            ]
            result = n.target(*entering, **kwargs)  # type: ignore[operator]
        else:
            result = super().run_node(n)
        if n.op == "call_function" and n.target in _LAYERS:
            self._kept[n.name] = result
        return result


def _observer(graph: nn.Module, node: Any) -> Any:
    """The observer a node calls, one that quantizes to integers; None for any other node or argument."""
    if not isinstance(node, torch.fx.Node) or node.op != "call_module":
        return None
    module = graph.get_submodule(str(node.target))
    base = torchao_module("observer").UniformQuantizationObserverBase
    return module if isinstance(module, base) else None


def _rounded(value: Tensor, observer: Any) -> Tensor:
    scale, zero_point = observer.calculate_qparams()
    lowest, highest = observer.quant_min, observer.quant_max
    if scale.numel() == 1:
        return torch.fake_quantize_per_tensor_affine(value, float(scale), int(zero_point), lowest, highest)
    return torch.fake_quantize_per_channel_affine(
        value, scale, zero_point.to(torch.int32), observer.ch_axis, lowest, highest
    )


def _weight(graph: nn.Module, node: torch.fx.Node) -> Tensor:
    source = node.args[1]
    while isinstance(source, torch.fx.Node) and source.op != "get_attr":
        source = source.args[0]
    assert isinstance(source, torch.fx.Node)
    parent, _, leaf = str(source.target).rpartition(".")
    return getattr(graph.get_submodule(parent), leaf)


def _module_name(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values()]
    return names[-1] if names and names[-1] else node.name
