"""The table at the end of `repkern quickstart`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from repkern.cli._console import megabytes, milliseconds, percent

__all__ = ["LABELS", "print_report"]

LABELS = {"plain": "plain", "orepa": "OREPA"}
_COLUMNS = ("plain", "orepa", "deployed")


def print_report(console: Console, summary: dict[str, Any], folder: str) -> None:
    """One table, what its figures mean, and what to do next."""
    console.print()
    console.print(_table(summary))
    settings = summary["recipe"]["train"]
    console.print(
        f"Times are medians, the networks taking turns; a training step has {settings['batch_size']} images. Memory is "
        "the most that torch's allocator held in a training step: weights, gradients, optimizer state, activations.",
        style="dim",
    )
    console.print(f"\nDone in {summary['total_seconds']:.0f} s. In {folder}:", soft_wrap=True, markup=False)
    for name, what in (
        ("plain.safetensors", "the deployed network: plain convolutions only"),
        ("curves.png", "loss and accuracy of both trainings"),
        ("summary.json", "every figure above, and the settings"),
        ("plain/, orepa/", "metrics by epoch, checkpoints"),
    ):
        console.print(f"  {name:<18} {what}", soft_wrap=True, markup=False)
    console.print("\nIn your own training:", soft_wrap=True)
    for line in (
        "model = repkern.replace_convs(model)                        # before training",
        "model = repkern.reparameterize(model.eval(), verify=batch)  # after it",
    ):
        console.print(f"  {line}", style="cyan", soft_wrap=True, markup=False)


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title="One network, trained plain and with OREPA, on real digits", title_style="bold")
    table.add_column("")
    for heading in ("plain", "OREPA\nin training", "OREPA\ndeployed"):
        table.add_column(heading, justify="right")
    steps, peaks = summary["train_step_seconds"], summary["train_peak_bytes"]
    latency = summary["latency_seconds"]
    rows: list[tuple[str, list[str]]] = [
        (f"test accuracy ({summary['test_images']} images)", [percent(summary["accuracy"][c]) for c in _COLUMNS]),
        ("parameters", [f"{summary['parameters'][c]:,}" for c in _COLUMNS]),
        ("training step", [milliseconds(steps["plain"]), _compared(steps, milliseconds), "-"]),
        ("peak memory in training", [megabytes(peaks["plain"]), _compared(peaks, megabytes), "-"]),
        ("latency, one image", [milliseconds(latency[c]) for c in _COLUMNS]),
        ("largest output difference", ["-", "reference", _difference(summary["max_difference"])]),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    table.caption = Text(
        f"outputs are logits up to {summary['largest_output']:.1f}, "
        f"compared on all {summary['test_images']} test images"
    )
    return table


def _difference(value: float) -> str:
    return "none" if value == 0 else f"{value:.1e}"


def _compared(values: dict[str, float], unit: Any) -> str:
    return f"{unit(values['orepa'])} (x{values['orepa'] / values['plain']:.2f})"
