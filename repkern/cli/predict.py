"""`repkern predict`: what a trained network sees in single images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from repkern.cli._console import console, percent
from repkern.cli._models import AsJson, Block, working
from repkern.cli._options import TRAINING, Changes, Device, DeviceOption, check_extras, chosen_device
from repkern.cli._trained import ModelName, RecipeOption, Which, changed, open_trained

if TYPE_CHECKING:
    from repkern.train.predicting import Prediction

__all__ = ["predict"]


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    checkpoint: Annotated[
        Path,
        typer.Option("--checkpoint", "-c", metavar="RUN_OR_CHECKPOINT", help="A run folder, or a file of weights."),
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes of each image.")] = 5,
    recipe: RecipeOption = None,
    changes: Changes = None,
    which: Which = "best",
    model: ModelName = None,
    block: Block = None,
    device: DeviceOption = Device.auto,
    as_json: AsJson = False,
) -> None:
    """Print the likeliest classes of images.

    Images are prepared as the test images of the run were: cropped, resized,
    normalized. A file of weights has no class names; their numbers are printed,
    and images are prepared as ImageNet's are unless --recipe says otherwise.

    [bold]Examples[/]

    repkern predict rose.jpg tulip.png --checkpoint runs/flowers

    repkern predict *.jpg -c runs/flowers --top 1 --json

    repkern predict cat.jpg -c RepVGG-A0-train.pth --model repvgg_a0
    """
    check_extras("predict", TRAINING | {"PIL": "Pillow"}, "train")
    with working(as_json, lines=False) as say:
        from repkern.train.predicting import predict as predictions

        say("Reading the network")
        trained = open_trained(checkpoint, model=model, block=block, recipe=recipe, which=which)
        data = changed(trained.recipe, changes or []).data
        say("Looking at the images")
        found = list(
            predictions(
                trained.model,
                images,
                trained.classes,
                data,
                channels=trained.channels,
                image_size=data.image_size or trained.image_size,
                top=top,
                device=chosen_device(device),
            )
        )
    if as_json:
        typer.echo(json.dumps([prediction.as_json() for prediction in found], indent=2))
    else:
        _print(found)


def _print(found: list[Prediction]) -> None:
    to: Any = console()
    width = max(len(name) for prediction in found for name, _ in prediction.classes)
    for prediction in found:
        to.print(f"[bold]{escape(prediction.path)}[/]", soft_wrap=True)
        for name, probability in prediction.classes:
            to.print(f"  {escape(f'{name:<{width}}')}  {percent(probability):>8}", soft_wrap=True)
