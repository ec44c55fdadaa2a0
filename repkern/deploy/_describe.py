"""Fills the report of an optimized model from what was found while choosing."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from repkern.deploy._choice import Record
from repkern.deploy.inference_conv import InferenceConv2d
from repkern.deploy.inference_model import InferenceModel
from repkern.deploy.report import LayerReport

__all__ = ["describe"]


def describe(
    model: InferenceModel,
    layers: Mapping[InferenceConv2d, list[str]],
    records: Mapping[InferenceConv2d, Record],
    stepped: Mapping[InferenceConv2d, bool],
    skip: Collection[str],
) -> None:
    """Put one LayerReport for every layer into model.report, and the bytes of their weights."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, InferenceConv2d)}
    before = after = 0
    reports = []
    for layer, name in names.items():
        record = records.get(layer, Record())
        seconds = _seconds(record)
        spec = layer.spec
        size = "linear" if spec.linear else f"{spec.kernel_size[0]}x{spec.kernel_size[1]}"
        kernel = f"{spec.in_channels}->{spec.out_channels} {size}"
        kernel += "" if spec.stride == (1, 1) else f" /{spec.stride[0]}"
        kernel += "" if spec.groups == 1 else f" g{spec.groups}"
        reports.append(
            LayerReport(
                name or "(root)",
                kernel,
                list(layers.get(layer, [])),
                [list(shape) for shape in record.calls],
                layer.method,
                _why(layer, record, seconds, stepped.get(layer, False)),
                seconds,
                dict(record.errors),
                record.reasons | dict.fromkeys(skip, "the outputs of the model would differ too much"),
            )
        )
        plain = layer.kernel()
        before += _size(plain)
        after += sum(_size(tensor) for tensor in layer.held_weights())
    model.report.layers = reports
    model.report.weight_bytes = (before, after)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _seconds(record: Record) -> dict[str, float]:
    """Of all calls that the example makes, by the methods that can do them all."""
    return {
        name: sum(count * record.seconds[shape][name] for shape, count in record.calls.items())
        for name in record.usable()
        if record.calls
    }


def _why(layer: InferenceConv2d, record: Record, seconds: Mapping[str, float], stepped: bool) -> str:
    if not record.calls:
        return "the example does not reach it"
    if stepped:
        return "the fastest that `memory` allows"
    if len(seconds) == 1:
        return "nothing else can run it"
    torchs = seconds["torch"]
    if layer.method == "torch":
        return f"fastest of {len(seconds)}"
    return f"{torchs / seconds[layer.method]:.2f}x torch, fastest of {len(seconds)}"
