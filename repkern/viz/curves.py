"""Training curves of several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_curves"]

# Okabe and Ito's palette, told apart by readers with any colour vision; markers carry the same difference in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")


def plot_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, loss_label: str = "loss") -> None:
    """Write a PNG with the loss and the test accuracy by epoch, one colour for each name in `histories`.

    Rows are those of `Trainer.fit`; epochs without a test leave a gap in what tests show. ValueError when there is
    nothing to draw or no colour left.
    """
    from matplotlib.figure import Figure

    if not histories or not all(any("test_loss" in row for row in rows) for rows in histories.values()):
        raise ValueError(f"every history needs at least one epoch, got {[len(rows) for rows in histories.values()]}")
    if len(histories) > len(_COLOURS):
        raise ValueError(f"at most {len(_COLOURS)} runs fit into one plot, got {len(histories)}")
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, rows) in enumerate(histories.items()):
        _draw_losses(left, name, rows, index)
        _draw_accuracy(right, name, rows, index)
    _finish(left, loss_label, _loss_title(histories))
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    _finish(right, "test accuracy (%)", _accuracy_title(histories))
    right.set_ylim(_lowest_shown(histories), 100.3)
    figure.savefig(path, metadata={"Software": "repkern"})


def _draw_losses(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]], index: int) -> None:
    tested = _tested(rows)
    style: dict[str, Any] = {"color": _COLOURS[index], "linewidth": 1.6}
    epochs = [row["epoch"] for row in rows]
    axes.plot(epochs, [row["train_loss"] for row in rows], linestyle="--", label=f"{name}, training images", **style)
    losses = [row["test_loss"] for row in tested]
    axes.plot([row["epoch"] for row in tested], losses, label=f"{name}, test images", **_marked(index), **style)


def _draw_accuracy(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]], index: int) -> None:
    tested = _tested(rows)
    epochs = [row["epoch"] for row in tested]
    accuracy = [100 * row["test_accuracy"] for row in tested]
    axes.plot(epochs, accuracy, color=_COLOURS[index], linewidth=1.6, label=name, **_marked(index))


def _tested(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if "test_loss" in row]


def _marked(index: int) -> dict[str, Any]:
    return {"marker": _MARKERS[index], "markersize": 3.5}


def _finish(axes: Axes, label: str, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _lowest_shown(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """In %, a little below the second half of the training: first epochs would flatten the part worth seeing."""
    late = [100 * row["test_accuracy"] for rows in map(_tested, histories.values()) for row in rows[len(rows) // 2 :]]
    return max(0.0, 5 * math.floor(min(late) / 5) - 5)


def _loss_title(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    ends = ", ".join(f"{name} {rows[-1]['train_loss']:.3f}" for name, rows in histories.items())
    return f"Training loss falls to: {ends}"


def _accuracy_title(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    ends = ", ".join(f"{name} {100 * _tested(rows)[-1]['test_accuracy']:.2f} %" for name, rows in histories.items())
    return f"Test accuracy reaches: {ends}"
