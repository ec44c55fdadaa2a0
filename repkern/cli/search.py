"""`repkern search hyper`: the scales of a RepOptimizer, by training a network with scaled branches."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from repkern.cli import _console
from repkern.cli._console import percent
from repkern.cli._models import AsJson
from repkern.cli.quickstart import Device
from repkern.cli.repopt import (
    Data,
    DeviceOption,
    Fresh,
    Model,
    Number,
    Resume,
    Seed,
    Size,
    Threads,
    check_model,
    chosen,
)

if TYPE_CHECKING:
    from repkern.train.repopt import RepOptConfig
    from repkern.train.runs import Run

__all__ = ["app"]

_OUT = Path("runs/search")

app = typer.Typer(no_args_is_help=True, help="Search what a network is trained with, before training it.")


@app.callback()
def _root() -> None:
    pass


@app.command()
def hyper(
    model: Model = None,
    data: Data = None,
    image_size: Size = None,
    epochs: Annotated[Number, typer.Option(min=1, help="Epochs of the search.", show_default="12")] = None,
    device: DeviceOption = Device.auto,
    out: Annotated[Path, typer.Option(help="Run folder; -2, -3, ... is added when it is taken.")] = _OUT,
    seed: Seed = None,
    threads: Threads = None,
    resume: Resume = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Find the scales of a RepOptimizer on a small data set.

    Every 3x3 convolution of the network becomes a sum of 3x3, 1x1 and identity
    branches with a trained scale for each channel behind each of them. After the
    training only the scales are kept: scales.safetensors in the run folder. They
    belong to the network, not to the data: search on small images, train on your
    own with repkern.optim.from_scales(model, "scales.safetensors", lr=0.1).

    [bold]Examples[/]

    repkern search hyper                                       on digits

    repkern search hyper --model repopt_vgg_b1 --data cifar100 --epochs 240
    """
    mode = chosen(resume, fresh, data)
    given = {
        "search_epochs": epochs, "seed": seed, "threads": threads, "image_size": image_size,
        "data": None if data is None else str(data.absolute()), "model": model,
    }  # fmt: skip
    check_model(model)
    _hyper(device, out, {name: value for name, value in given.items() if value is not None}, mode, as_json)


def _hyper(device: Device, out: Path, given: dict[str, Any], mode: str, as_json: bool) -> None:
    from repkern.cli._runs import settings, training_run
    from repkern.train.repopt import RepOptConfig

    config, named = settings(RepOptConfig, device, given)
    to = Console(stderr=True, highlight=False) if as_json else _console.console()
    with training_run(out, config, mode, named, command="repkern search hyper", default=_OUT, to=to) as run:
        summary = _work(to, run)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))


def _work(to: Console, run: Run[RepOptConfig]) -> dict[str, Any]:
    from repkern.cli._progress import training_progress
    from repkern.cli._runs import shown, started
    from repkern.train.repopt import SCALES, load_data, run_hyper_search
    from repkern.train.reproducible import deterministic

    config = run.config
    started(to, run, f"the scales of {config.model or 'a small VGG'} on {config.data or 'scanned 8x8 digits'},")
    with contextlib.ExitStack() as bars, deterministic(config.threads):
        progress = bars.enter_context(training_progress(to))
        scales, rows = run_hyper_search(
            config, load_data(config), run.path, callbacks=lambda name: [progress(f"{name:<8}")]
        )
    means = {name: round(scale.double().mean().item(), 4) for name, scale in scales.items()}
    summary = {
        "scales": str(run.path / SCALES), "layers": len({name.rpartition(".")[0] for name in scales}),
        "accuracy": rows[-1]["test_accuracy"], "means": means, "config": config.to_dict(),
    }  # fmt: skip
    run.finish(summary)
    to.print(
        f"\n{summary['layers']} layers have scales, in {shown(run.path / SCALES)} (search accuracy "
        f"{percent(rows[-1]['test_accuracy'])}, which says little about what they are good for).",
        soft_wrap=True,
        markup=False,
    )
    to.print("\nIn your own training, with a fresh network:", soft_wrap=True)
    line = f'optimizer = repkern.optim.from_scales(model, "{SCALES}", lr=0.1, momentum=0.9, weight_decay=4e-5)'
    to.print(f"  {line}", style="cyan", soft_wrap=True, markup=False)
    return summary
