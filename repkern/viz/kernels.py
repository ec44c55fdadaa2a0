"""How the weights of 3x3 kernels are distributed, centre against surround, in several networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from repkern.deploy.quantize_report import kernel_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_kernels"]

_CENTRE, _SURROUND = "#D55E00", "#0072B2"
_BINS = 61
_MOST = 6


def plot_kernels(kernels: Mapping[str, Tensor], path: Path, *, title: str = "") -> None:
    """Write a PNG with one panel per network: the densities of its kernel's centres and of all other weights.

    kernels: name -> weight [Co, Ci/g, K, K], odd K > 1, of the same layer in each. All panels share their axes, so that
    what one INT8 scale has to cover can be compared; Figures 3 and 5 of RepOptimizers (paper 2205.15242) are such
    plots. ValueError when there is nothing to draw, too much, or another shape.
    """
    from matplotlib.figure import Figure

    if not 1 <= len(kernels) <= _MOST:
        raise ValueError(f"1 to {_MOST} kernels fit into one plot, got {len(kernels)}")
    flat = {name: kernel_spread(weight) for name, weight in kernels.items()}
    for name, spread in flat.items():
        if spread.centre is None:
            raise ValueError(f"{name}: a kernel [Co, Ci, K, K] with odd K > 1 is needed, got {_shape(kernels[name])}")
    figure = Figure(figsize=(3.4 * len(kernels) + 0.6, 3.6), dpi=150, layout="constrained")
    panels: Any = figure.subplots(1, len(kernels), sharex=True, sharey=True, squeeze=False)
    limit = max(spread.largest for spread in flat.values()) or 1.0
    for axes, (name, weight) in zip(panels[0], kernels.items(), strict=True):
        _draw(axes, weight, limit)
        spread = flat[name]
        axes.set_title(
            f"{name}\nstd {spread.overall:.3g}: centre {spread.centre:.3g}, surround {spread.surround:.3g}",
            loc="left",
            fontsize=9,
        )
    panels[0][0].set_ylabel("density")
    panels[0][0].legend(frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, metadata={"Software": "repkern"})


def _draw(axes: Axes, weight: Tensor, limit: float) -> None:
    import numpy

    middle = weight.shape[2] // 2
    is_centre = numpy.zeros(tuple(weight.shape[2:]), dtype=bool)
    is_centre[middle, middle] = True
    values = weight.detach().cpu().double().numpy()
    edges = numpy.linspace(-limit, limit, _BINS + 1).tolist()
    for label, mask, colour in (("surround", ~is_centre, _SURROUND), ("centre", is_centre, _CENTRE)):
        axes.hist(
            values[:, :, mask].ravel(), edges, density=True, histtype="stepfilled",
            color=colour, alpha=0.45, edgecolor=colour, label=label,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("weight")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _shape(weight: Tensor) -> str:
    return "[" + ", ".join(map(str, weight.shape)) + "]"
