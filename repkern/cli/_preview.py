"""How `repkern train --dry-run` shows a recipe: its settings, the layers of its network, and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from repkern.cli._console import megabytes, print_pairs

if TYPE_CHECKING:
    from repkern.train.preview import Preview

__all__ = ["print_preview"]

_FIRST = ("version", "name", "about", "paper", "model", "data")
_NOTHING: tuple[Any, ...] = ("", None, [], {})


def print_preview(to: Console, preview: Preview) -> None:
    """The whole recipe as YAML, a table of layers, and what one process takes."""
    import yaml

    values = _ordered(preview.recipe.model_dump(mode="json"))
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)
    to.print(text, markup=False, soft_wrap=True)
    _print_layers(to, preview)
    _print_memory(to, preview)


def _ordered(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without empty texts, lists and absent sections, which say nothing; what it is comes first."""
    order = {name: values[name] for name in _FIRST} | dict(values)
    return {
        name: _told(value) if isinstance(value, Mapping) else value
        for name, value in order.items()
        if value not in _NOTHING
    }


def _told(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if value not in _NOTHING}


def _print_layers(to: Console, preview: Preview) -> None:
    size = preview.data.image_size
    rows = [
        (
            layer.name,
            layer.kind,
            "x".join(map(str, layer.output)),
            f"{layer.parameters:,}",
            _millions(layer.multiply_adds),
        )
        for layer in preview.layers
        if layer.parameters or layer.multiply_adds
    ]
    rows.append(("total", "", "", f"{preview.parameters:,}", _millions(preview.multiply_adds)))
    head = ("layer", "kind", "output", "parameters", "M mult-adds")
    if not to.is_terminal:
        widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
        for row in (head, *rows):
            cells = [f"{c:<{w}}" if at < 3 else f"{c:>{w}}" for at, (c, w) in enumerate(zip(row, widths, strict=True))]
            to.print("  ".join(cells).rstrip(), markup=False, soft_wrap=True)
    else:
        table = Table(*head, box=None, header_style="bold")
        for column in table.columns[3:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row, style="bold" if row is rows[-1] else None)
        to.print(table)
    shape = f"{preview.data.channels}x{size}x{size}"
    to.print(f"\nThe training form, for one image of {shape}, {len(preview.data.classes)} classes.\n", markup=False)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}"


def _print_memory(to: Console, preview: Preview) -> None:
    memory = preview.memory
    rows = [
        ("weights", megabytes(memory.weights)),
        ("optimizer", megabytes(memory.optimizer)),
        *([("average", megabytes(memory.ema))] if memory.ema else []),
        (
            "a step",
            f"{megabytes(memory.step)} (activations, gradients; {megabytes(memory.kept)} kept for the backward)",
        ),
        (
            "in all",
            f"[bold]{megabytes(memory.total)}[/] for {preview.images} images a step of each process, as an estimate",
        ),
    ]
    print_pairs(to, rows)
