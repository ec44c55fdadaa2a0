"""`repkern reparameterize`: a checkpoint in training form -> plain convolutions, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from repkern.cli._console import console, megabytes, print_pairs, warn
from repkern.cli._models import AsJson, Block, Classes, ModelName, Source, check_names, check_paths, difference, working

if TYPE_CHECKING:
    from repkern.deploy import Conversion

__all__ = ["reparameterize"]


def reparameterize(
    source: Source,
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="What to write: .safetensors or .pth.")],
    model: ModelName = None,
    block: Block = None,
    num_classes: Classes = None,
    verify: Annotated[
        int, typer.Option(min=0, metavar="SIZE", help="Side of the images for the comparison; 0: no comparison.")
    ] = 64,
    batch: Annotated[int, typer.Option(min=1, help="How many images are compared.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Turn a trained network into plain convolutions, and prove it equal.

    IN is a file that repkern wrote, or, with the name of its network, a released
    checkpoint of RepVGG, ACNet, DBB, OREPA, RepOptimizers, MobileOne, RepGhost,
    QARepVGG or timm. Both forms are run on random images, the training form in
    float64 too; beyond rounding, the command fails and writes nothing.

    [bold]Examples[/]

    repkern reparameterize trained.safetensors plain.safetensors

    repkern reparameterize RepVGG-A0-train.pth a0.safetensors --model repvgg_a0

    repkern reparameterize in.pth out.pth --model resnet18 --verify 224
    """
    from repkern.models.saving import SUFFIXES

    check_paths(source, destination, SUFFIXES)
    check_names(source, model, block)
    with working(as_json) as say:
        from repkern.deploy import reparameterize_file

        done = reparameterize_file(
            source,
            destination,
            model=model,
            block=block,
            num_classes=num_classes,
            image_size=verify or None,
            batch=batch,
            say=say,
        )
    for text in done.report.warnings:
        warn(text)
    if as_json:
        typer.echo(json.dumps(done.as_json(), indent=2))
        return
    _print(done)


def _print(done: Conversion) -> None:
    report = done.report
    before, after = done.parameters
    read, written = done.size_bytes
    rows = [
        ("network", f"{done.model}, blocks {done.block} (layout {', '.join(done.layouts)})"),
        ("converted", f"{len(report.converted)} blocks" if report.converted else "nothing: it was in deployed form"),
        ("parameters", f"{before:,} -> {after:,}"),
        ("file", f"{megabytes(read)} -> {megabytes(written)}"),
    ]
    if report.worst_output is None:
        rows.append(("difference", "not compared (--verify 0)"))
    else:
        rows.append(("compared", f"on {done.batch} images {done.image_size}x{done.image_size}"))
        rows.append(("largest difference", difference(report.worst_output)))
        if report.worst_in_float64 is not None:
            rows.append(("in float64", difference(report.worst_in_float64)))
        if report.worst_block is not None:
            rows.append(("worst block", f"{escape(report.worst_block.name)}: {difference(report.worst_block)}"))
    print_pairs(console(), [*rows, ("written", escape(done.destination))])
