"""What `optimize_for_inference` found and chose, as a table and as JSON values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LayerReport", "OptimizeReport"]


@dataclass
class LayerReport:
    """One convolution. fused: what runs inside its call. shapes: of its inputs, with calls and times by method.

    method: the chosen one; why: the reason. seconds: of one pass of the example through the layer, by method.
    errors: relative L2 difference from torch's result. excluded: methods that could not be used, and why.
    """

    name: str
    kernel: str
    fused: list[str]
    shapes: list[list[int]]
    method: str
    why: str
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """Over torch's convolution, in the timing that the choice was made by; 1 where nothing was timed."""
        if self.method not in self.seconds:
            return 1.0
        return self.seconds["torch"] / self.seconds[self.method]


@dataclass
class OptimizeReport:
    """layers in the order of the model. kept: convolutions left as they were, and why. notes: about the whole model.

    traced: whether the model was fused as one graph. channels_last: whether its maps are kept so inside. difference:
    of the outputs on the example from the model's own, relative to their largest value. weight_bytes: of the converted
    layers, before and after.
    """

    precision: str
    accuracy: str
    device: str
    threads: int
    traced: bool = False
    channels_last: bool = False
    difference: float = 0.0
    weight_bytes: tuple[int, int] = (0, 0)
    layers: list[LayerReport] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "kernel", "input", "method", "ms", "torch ms", "error", "why")]
        rows += [_row(layer) for layer in self.layers]
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        lines = [
            f"{self.precision}, accuracy {self.accuracy}, {self.device}, {self.threads} threads, "
            f"{'one graph' if self.traced else 'module by module'}, "
            f"{'channels_last' if self.channels_last else 'memory format of the input'}"
        ]
        lines += [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines += [f"kept as it is: {name} ({why})" for name, why in self.kept.items()]
        lines += self.notes
        before, after = (size / 1e6 for size in self.weight_bytes)
        lines.append(f"difference of the outputs {self.difference:.1e}, weights {before:.1f} MB, now {after:.1f} MB")
        return "\n".join(lines)


def _row(layer: LayerReport) -> tuple[str, ...]:
    shapes = "x".join(map(str, layer.shapes[0])) if layer.shapes else "not seen"
    more = f" and {len(layer.shapes) - 1} more" if len(layer.shapes) > 1 else ""
    time, torchs = (
        f"{1e3 * layer.seconds[name]:.3f}" if name in layer.seconds else "" for name in (layer.method, "torch")
    )
    error = f"{layer.errors[layer.method]:.0e}" if layer.method in layer.errors else ""
    kernel = " + ".join([layer.kernel, *layer.fused])
    return layer.name, kernel, shapes + more, layer.method, time, torchs, error, layer.why
