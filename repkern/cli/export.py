"""`repkern export`: a checkpoint -> ONNX or torch.export, compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.markup import escape

from repkern.cli._console import WRONG_USE, console, fail, megabytes, print_pairs, warn
from repkern.cli._models import AsJson, Block, Classes, ModelName, Source, check_names, check_paths, difference, working

if TYPE_CHECKING:
    from repkern.deploy import ExportReport

__all__ = ["export"]

Number = Optional[int]  # noqa: UP045


def export(
    source: Source,
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="What to write: .onnx or .pt2 (torch.export).")],
    model: ModelName = None,
    block: Block = None,
    num_classes: Classes = None,
    image_size: Annotated[
        Number, typer.Option(min=1, help="Side of the images.", show_default="224, or 32 for CIFAR")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N|dynamic", help="Images at a time; dynamic: any number.")] = "dynamic",
    opset: Annotated[Number, typer.Option(min=1, help="Of ONNX.", show_default="torch's")] = None,
    verify: Annotated[bool, typer.Option(help="Run the written file and compare.")] = True,
    as_json: AsJson = False,
) -> None:
    """Write a trained network for an inference engine, and prove it equal.

    The network is turned into plain convolutions first. An ONNX file is checked
    by onnx and run by onnxruntime, a .pt2 file is read back and run by torch, on
    several batch sizes. The outputs are compared with those of the training form
    in float64; beyond rounding, the command fails and writes nothing.
    ONNX needs: pip install 'repkern\\[export]'

    [bold]Examples[/]

    repkern export trained.safetensors net.onnx

    repkern export RepVGG-A0-train.pth a0.onnx --model repvgg_a0 --opset 18

    repkern export trained.pth net.pt2 --image-size 320 --batch 1
    """
    from repkern.deploy import FILE_SUFFIXES

    check_paths(source, destination, FILE_SUFFIXES)
    size = _batch(batch)
    if opset is not None and destination.suffix != ".onnx":
        fail(f"--opset (={opset}) is for .onnx files, OUT is {destination.name}", WRONG_USE)
    check_names(source, model, block)
    with working(as_json) as say:
        from repkern.deploy import export as write
        from repkern.deploy.convert import images_for, quiet_about_conversion
        from repkern.deploy.opening import open_model, usual_image_size

        say(f"reading {source}")
        opened = open_model(source, model=model, block=block, num_classes=num_classes)
        side = image_size or usual_image_size(opened.model)
        images = images_for(opened.model, size or 2, side)
        say("converting, writing and comparing" if verify else "converting and writing")
        with quiet_about_conversion():
            done = write(opened.model, destination, images, dynamic_batch=size is None, opset=opset, verify=verify)
    for text in done.conversion.warnings:
        warn(text)
    network = {"model": opened.model.model_name, "block": opened.model.block, "layouts": opened.layouts}
    if as_json:
        typer.echo(json.dumps({"source": str(source), **network, "image_size": side, **done.as_json()}, indent=2))
        return
    _print(done, network, images.shape)


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        fail(f"--batch must be dynamic or a number from 1, got {text!r}", WRONG_USE)
    return int(text)


def _print(done: ExportReport, network: dict[str, Any], shape: Sequence[int]) -> None:
    converted = len(done.conversion.converted)
    batch, *sizes = shape
    rows = [
        ("network", f"{network['model']}, blocks {network['block']} (layout {', '.join(network['layouts'])})"),
        ("converted", f"{converted} blocks" if converted else "nothing: it was in deployed form"),
        ("input", f"{'x'.join(map(str, sizes))}, {'any batch size' if done.dynamic_batch else f'batch {batch}'}"),
    ]
    if not done.checks:
        rows.append(("difference", "not compared (--no-verify)"))
    rows += [(f"batch {check.batch}", difference(check.worst)) for check in done.checks]
    rows.append(("written", f"{escape(done.path)}, {done.format}, {megabytes(done.size_bytes)}"))
    print_pairs(console(), rows)
