"""`repkern models`: the networks there are, and their sizes."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from repkern.cli._console import WRONG_USE, console, fail
from repkern.cli._models import AsJson, working

__all__ = ["models"]


def models(
    pattern: Annotated[str, typer.Argument(help="A shell pattern, such as 'repvgg_*'.")] = "*",
    as_json: AsJson = False,
) -> None:
    """List the networks of repkern.create_model, with their parameters in both forms.

    [bold]Examples[/]

    repkern models                all of them

    repkern models 'resnet*'      those whose name begins so

    repkern models --json         for a program
    """
    with working(as_json, lines=False) as say:
        from repkern.models import list_models
        from repkern.models.sizes import model_size

        rows = []
        for name in list_models(pattern):
            say(f"counting {name}")
            rows.append(model_size(name))
    if not rows:
        fail(f"no network matches {pattern!r}; `repkern models` lists all {len(list_models())}", WRONG_USE)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name")
    table.add_column("published block")
    for heading in ("parameters", "deployed", "classes"):
        table.add_column(heading, justify="right")
    for row in rows:
        counts = (f"{row['parameters'] / 1e6:.2f} M", f"{row['deployed_parameters'] / 1e6:.2f} M")
        table.add_row(row["name"], row["block"], *counts, str(row["num_classes"]))
    console().print(table)
