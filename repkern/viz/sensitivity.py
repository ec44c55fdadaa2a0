"""What quantization costs in every layer of several networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repkern.viz.curves import _COLOURS, _marked

if TYPE_CHECKING:
    from repkern.deploy.quantize_report import SensitivityReport

__all__ = ["plot_sensitivity"]


def plot_sensitivity(reports: Mapping[str, SensitivityReport], path: Path) -> None:
    """Write a PNG: the SQNR of each layer's output when only that layer is quantized, and when all are.

    Layers are numbered in the order they run; higher is better, and 6 dB are one bit. ValueError when there is nothing
    to draw or no colour left.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not reports or not all(report.layers for report in reports.values()):
        raise ValueError(f"every report needs at least one layer, got {[len(r.layers) for r in reports.values()]}")
    if len(reports) > len(_COLOURS):
        raise ValueError(f"at most {len(_COLOURS)} networks fit into one plot, got {len(reports)}")
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    for index, (name, report) in enumerate(reports.items()):
        numbers = list(range(1, len(report.layers) + 1))
        style: dict[str, Any] = {"color": _COLOURS[index], "linewidth": 1.6, **_marked(index)}
        panels[0].plot(numbers, [layer.own for layer in report.layers], label=name, **style)
        panels[1].plot(
            numbers,
            [layer.accumulated for layer in report.layers],
            label=f"{name}, logits {report.network:.1f}",
            **style,
        )
    panels[0].set_ylabel("SQNR of the layer's output (dB)")
    for axes, title in zip(panels, ("Only this layer quantized", "Everything quantized"), strict=True):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": "repkern"})
