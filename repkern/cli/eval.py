"""`repkern eval`: the accuracy of a trained network on test images."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repkern.cli._console import WRONG_USE, fail, percent, print_pairs
from repkern.cli._models import AsJson, Block, working
from repkern.cli._options import (
    TRAINING,
    Changes,
    DataFolder,
    Device,
    DeviceOption,
    Threads,
    check_extras,
    chosen_device,
)
from repkern.cli._trained import ModelName, RecipeOption, Which, changed, open_trained, prepared

if TYPE_CHECKING:
    from repkern.train.recipe import Recipe
    from repkern.train.trained import TrainedNetwork

__all__ = ["evaluate"]


def evaluate(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder, or a file of weights.", show_default=False),
    ],
    data: DataFolder = None,
    recipe: RecipeOption = None,
    changes: Changes = None,
    which: Which = "best",
    model: ModelName = None,
    block: Block = None,
    device: DeviceOption = Device.auto,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Test a trained network on the test images of its data.

    A run folder knows its network, its data and the names of the classes. A file
    of weights, ours or a released checkpoint, needs images: --data FOLDER with
    train/CLASS and test/CLASS, read as ImageNet is, or the --recipe whose data
    and preparation is meant.

    [bold]Examples[/]

    repkern eval runs/digits_orepa

    repkern eval runs/flowers --data other_flowers --which last

    repkern eval runs/l2 -s data.image_size=320 -s data.test_crop=1

    repkern eval RepVGG-A0-train.pth --model repvgg_a0 --recipe repvgg_table4_a0 --data /data/imagenet
    """
    check_extras("eval", TRAINING, "train")
    with working(as_json, lines=False) as say:
        say("Reading the network")
        trained = open_trained(source, model=model, block=block, recipe=recipe, which=which)
        if source.is_file() and recipe is None and data is None:
            fail("say on which images: --data FOLDER, or --recipe NAME for its data", WRONG_USE)
        wanted = changed(prepared(trained.recipe, None if data is None else str(data)), changes or [])
        say("Testing")
        summary = _tested(trained, wanted, chosen_device(device), threads)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _print(summary)


def _tested(trained: TrainedNetwork, recipe: Recipe, device: str, threads: int | None) -> dict[str, Any]:
    import torch

    from repkern.train.accuracy import evaluate as test
    from repkern.train.build import build_data
    from repkern.train.distributed import Runtime

    if threads is not None:
        torch.set_num_threads(threads)
    # One process tests, whatever the network was trained with.
    here = recipe.train.model_copy(update={"device": device, "strategy": "ddp"})
    recipe = recipe.model_copy(update={"train": here})
    data = build_data(recipe)
    counted: list[int] = []
    with Runtime(recipe.train) as runtime:
        began = time.perf_counter()
        metrics = test(trained.model, data, recipe, runtime, progress=counted.append)
        seconds = time.perf_counter() - began
    return {
        **metrics,
        "images": sum(counted),
        "classes": len(data.classes),
        "images_per_second": round(sum(counted) / seconds, 1),
        "network": recipe.model.name,
        "data": recipe.data.root or recipe.data.name,
        "step": trained.step,
        "seconds": round(seconds, 2),
    }


def _print(summary: dict[str, Any]) -> None:
    from repkern.cli._console import console

    rows = [("accuracy", f"[bold]{percent(summary['test_accuracy'])}[/]")]
    if "test_top5" in summary:
        rows.append(("top 5", percent(summary["test_top5"])))
    rows += [
        ("loss", f"{summary['test_loss']:.4f}"),
        ("images", f"{summary['images']:,} of {summary['classes']} classes, {summary['data']}"),
        ("speed", f"{summary['images_per_second']:,.0f} images/s"),
    ]
    print_pairs(console(), rows)
