"""`repkern recipes`: the recipes that `repkern train` runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from repkern.cli._console import WRONG_USE, console, fail
from repkern.cli._models import AsJson
from repkern.cli._options import TRAINING, check_extras

if TYPE_CHECKING:
    from repkern.train.recipe_list import RecipeLine

__all__ = ["recipes"]


def recipes(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help='Such as "digits_*".')] = "*",
    as_json: AsJson = False,
) -> None:
    """List the recipes that come with repkern.

    Those called after a paper and a table are the rows of that table that can
    be trained again, with the accuracy that was printed there. digits_* and
    fashion_* end in minutes on two cores.

    [bold]Examples[/]

    repkern recipes

    repkern recipes "orepa_*"

    repkern train orepa_table3_scalar --dry-run      one of them as a whole
    """
    check_extras("recipes", TRAINING, "train")
    from repkern.train.recipe_list import recipe_lines

    lines = recipe_lines(pattern)
    if not lines:
        fail(f"no recipe matches {pattern!r}; `repkern recipes` lists all", WRONG_USE)
    if as_json:
        typer.echo(json.dumps([line._asdict() for line in lines], indent=2))
        return
    to = console()
    if not to.is_terminal:
        for line in lines:
            typer.echo("\t".join(_cells(line)))  # rich would make the tabs spaces
        return
    table = Table("recipe", "network", "block", "data", "epochs", "paper", "", box=None, header_style="bold")
    for line in lines:
        table.add_row(*(escape(cell) for cell in _cells(line)))
    to.print(table)


def _cells(line: RecipeLine) -> list[str]:
    top1 = "" if line.top1 is None else f"{line.top1:.2f} %"
    return [line.name, line.network, line.block, line.data, str(line.epochs), top1, line.about or line.source]
