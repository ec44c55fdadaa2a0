"""`repkern quantize`: a checkpoint -> an INT8 torch.export file, and what that costs layer by layer."""

from __future__ import annotations

import json
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repkern.cli._console import console, fail, megabytes, print_pairs, warn
from repkern.cli._models import AsJson, Block, Classes, ModelName, Source, check_names, check_paths, working

if TYPE_CHECKING:
    from repkern.deploy.quantize_report import SensitivityReport

__all__ = ["quantize"]

Number = Optional[int]  # noqa: UP045
_BATCH = 32


class Normalize(str, Enum):
    """What the network was trained on: pixels from 0 to 1, from -1 to 1, or with ImageNet's mean and deviation."""

    imagenet = "imagenet"
    signed = "signed"
    none = "none"


def quantize(
    source: Source,
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="What to write: .pt2 (torch.export).")],
    calibration: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", exists=True, file_okay=False, help="Training images, in folders or not; a sample is used."
        ),
    ],
    images: Annotated[int, typer.Option(min=1, help="How many of them.")] = 256,
    image_size: Annotated[
        Number, typer.Option(min=1, help="Side they get.", show_default="224, or 32 for CIFAR")
    ] = None,
    normalize: Annotated[Normalize, typer.Option(help="The range of pixels in training.")] = Normalize.imagenet,
    model: ModelName = None,
    block: Block = None,
    num_classes: Classes = None,
    layers: Annotated[int, typer.Option(min=0, help="How many of the worst layers are listed.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Quantize a trained network to INT8, and see what each layer loses.

    The network is turned into plain convolutions first. Weights get a scale for
    each channel, maps one range each: that which the calibration images have.
    SQNR compares the outputs before and after, in decibel: 6 dB are one bit, and
    below 20 dB predictions begin to change. Where one layer is to blame, train on
    (repkern.deploy.quantize.prepare_qat), or use blocks made for INT8.
    Needs: pip install 'repkern\\[quantize]'

    [bold]Examples[/]

    repkern quantize trained.safetensors int8.pt2 --calibration imagenet/train

    repkern quantize a0.pth a0.pt2 --model repvgg_a0 --calibration photos --images 512
    """
    check_paths(source, destination, (".pt2",))
    check_names(source, model, block)
    with working(as_json) as say:
        from repkern.data.folders import load_images
        from repkern.deploy.opening import open_model, usual_image_size
        from repkern.deploy.quantize import finish_ptq, observe
        from repkern.deploy.quantize_report import sensitivity_of
        from repkern.deploy.quantize_torchao import Scheme

        say(f"reading {source}")
        opened = open_model(source, model=model, block=block, num_classes=num_classes)
        side = image_size or usual_image_size(opened.model)
        say(f"reading images of {calibration}")
        pixels = load_images(calibration, images, side, opened.model.config["in_chans"])
        batches = list(_normalized(pixels, normalize).split(_BATCH))
        say(f"observing the network on {len(pixels)} images")
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", "reparameterize: ", UserWarning)
            graph, seen = observe(opened.model, batches, Scheme())
        say("measuring layer by layer")
        report = sensitivity_of(graph, batches[0], Scheme())
        say("converting and writing")
        network = finish_ptq(graph, seen, Scheme())
        network.info |= {"model": opened.model.model_name, "normalize": normalize.value}
        network.save(destination)
    for caution in caught:
        warn(str(caution.message))
    sizes = source.stat().st_size, destination.stat().st_size
    if as_json:
        found = {"source": str(source), "destination": str(destination), "size_bytes": sizes, **network.info}
        typer.echo(json.dumps({**found, "sensitivity": report.as_json()}, indent=2))
        return
    rows = [
        ("network", f"{opened.model.model_name}, blocks {opened.model.block} (layout {', '.join(opened.layouts)})"),
        ("calibrated", f"on {seen} images {side}x{side}, pixels {normalize.value}"),
        ("SQNR", f"{report.network:.1f} dB of the output"),
        ("file", f"{megabytes(sizes[0])} -> {megabytes(sizes[1])}"),
        ("written", escape(str(destination))),
    ]
    to = console()
    print_pairs(to, rows)
    if layers:
        _print_layers(to, report, layers)


def _normalized(pixels: Any, how: Normalize) -> Any:
    import torch

    if how is Normalize.none:
        return pixels
    if how is Normalize.signed:
        return pixels * 2 - 1
    if pixels.shape[1] != 3:
        fail(f"--normalize imagenet is for 3 channels, the network has {pixels.shape[1]}; take signed or none")
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / deviation[:, None, None]


def _print_layers(to: Console, report: SensitivityReport, count: int) -> None:
    table = Table(title="Layers whose quantization alone costs the output most", title_style="bold")
    table.add_column("layer", no_wrap=True)
    for heading in ("output\nSQNR, dB", "its own\nSQNR, dB", "weights\nstd", "centre", "surround"):
        table.add_column(heading, justify="right")
    for layer in report.worst(count):
        spread = layer.spread
        cells = [f"{layer.network:.1f}", f"{layer.own:.1f}"]
        cells += ["-" if v is None else f"{v:.4f}" for v in (spread.overall, spread.centre, spread.surround)]
        table.add_row(escape(layer.name), *cells)
    to.print()
    to.print(table)
