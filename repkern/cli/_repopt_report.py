"""The table at the end of `repkern repopt`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from repkern.cli._console import megabytes, milliseconds, percent

__all__ = ["LABELS", "print_report"]

LABELS = {"search": "search", "sgd": "SGD", "repopt": "RepOpt", "repvgg": "RepVGG", "qarepvgg": "QARepVGG"}
_COLUMNS = ("sgd", "repopt", "repvgg", "qarepvgg")


def print_report(console: Console, summary: dict[str, Any], folder: str, no_torchao: str | None) -> None:
    """One table, what its figures mean, and what to do next."""
    console.print()
    console.print(_table(summary))
    settings = summary["recipe"]["train"]
    console.print(
        f"SGD and RepOpt are the same plain network. Times are medians, the networks taking turns; a training step has "
        f"{settings['batch_size']} images. INT8: 8-bit weights with a scale per channel, 8-bit maps; SQNR compares its "
        "logits with the float network's (6 dB are one bit).",
        style="dim",
    )
    if no_torchao is not None:
        console.print(f"INT8 was left out: {no_torchao}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"\nDone in {summary['total_seconds']:.0f} s. In {folder}:", soft_wrap=True, markup=False)
    files = [
        ("scales.safetensors", "what the hyper-search found: all a RepOptimizer needs"),
        ("repopt.safetensors", "the network it trained: plain convolutions only"),
        ("curves.png", "loss and accuracy of all trainings"),
    ]
    if summary["quantized"] is not None:
        files.append(("kernels.png", "one kernel of each network: centre against surround"))
        files.append(("sensitivity.png", "what INT8 costs in every layer"))
    for name, what in [*files, ("summary.json", "every figure above, and the settings")]:
        console.print(f"  {name:<19} {what}", soft_wrap=True, markup=False)
    console.print("\nIn your own training:", soft_wrap=True)
    for line in (
        "search = repkern.search.HyperSearch(model)       # train search.model as any network, then",
        "optimizer = repkern.optim.from_scales(model, search.scales(), lr=0.1, momentum=0.9)",
    ):
        console.print(f"  {line}", style="cyan", soft_wrap=True, markup=False)


def _table(summary: dict[str, Any]) -> Table:
    data = summary["recipe"]["data"]["root"]
    table = Table(title=f"One plain network, trained four ways, on {data or 'real digits'}", title_style="bold")
    table.add_column("")
    for heading in ("plain,\nSGD", "plain,\nRepOpt", "RepVGG\nbranches", "QARepVGG\nbranches"):
        table.add_column(heading, justify="right")
    steps, peaks, quantized = summary["train_step_seconds"], summary["train_peak_bytes"], summary["quantized"]
    rows: list[tuple[str, list[str]]] = [
        (f"test accuracy ({summary['test_images']} images)", [percent(summary["accuracy"][c]) for c in _COLUMNS]),
        ("training step", [_compared(steps, c, milliseconds) for c in _COLUMNS]),
        ("peak memory in training", [_compared(peaks, c, megabytes) for c in _COLUMNS]),
        ("parameters in training", [f"{summary['parameters'][c]:,}" for c in _COLUMNS]),
    ]
    if quantized is not None:
        own, whole = quantized["int8"], quantized["int8_per_tensor"]
        rows += [
            ("INT8 accuracy", [f"{percent(own[c]['accuracy'])} ({_points(own[c])})" for c in _COLUMNS]),
            ("INT8 SQNR of the logits", [f"{own[c]['sqnr']:.1f} dB" for c in _COLUMNS]),
            ("INT8, one scale a kernel", [f"{percent(whole[c]['accuracy'])} ({_points(whole[c])})" for c in _COLUMNS]),
        ]
    for name, cells in rows:
        table.add_row(name, *cells)
    table.caption = Text(
        f"hyper-search: {summary['recipe']['search_epochs']} epochs, "
        f"{summary['training_seconds']['search']:.0f} s, accuracy {percent(summary['accuracy']['search'])}"
    )
    return table


def _points(loss: dict[str, float]) -> str:
    """The change in percentage points: "-0.28"."""
    change = 100 * (loss["accuracy"] - loss["float_accuracy"])
    return "=" if change == 0 else f"{change:+.2f}"


def _compared(values: dict[str, float], name: str, unit: Any) -> str:
    text = unit(values[name])
    return text if name == "sgd" else f"{text} (x{values[name] / values['sgd']:.2f})"
