"""`repkern search hyper`: the scales of a RepOptimizer, by training a network with scaled branches."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from repkern.cli import _console
from repkern.cli._console import percent
from repkern.cli._models import AsJson
from repkern.cli._options import (
    TRAINING,
    Changes,
    Data,
    Device,
    DeviceOption,
    Fresh,
    Model,
    Number,
    Resume,
    Seed,
    Size,
    Threads,
    check_extras,
    check_model,
    chosen_mode,
    images_and_network,
    images_of,
    network_of,
)

if TYPE_CHECKING:
    from repkern.train.repopt import RepOptRecipe
    from repkern.train.runs import Run

__all__ = ["app"]

_OUT = Path("runs/search")

RecipeOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--recipe", metavar="RECIPE", help="Whose network, data and schedule: a name or file.", show_default="repopt"
    ),
]

app = typer.Typer(no_args_is_help=True, help="Search what a network is trained with, before training it.")


@app.callback()
def _root() -> None:
    pass


@app.command()
def hyper(
    recipe: RecipeOption = None,
    changes: Changes = None,
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

    repkern search hyper --recipe digits_repopt                for that recipe's network
    """
    mode = chosen_mode(resume, fresh)
    needed = TRAINING | ({} if data or recipe else {"sklearn": "scikit-learn"})
    check_extras("search", needed, "quickstart")
    check_model(model)
    given = {
        "search_epochs": epochs, "train.seed": seed, "train.threads": threads,
        **images_and_network(data, image_size, model),
    }  # fmt: skip
    _hyper(recipe, changes or [], device, out, given, mode, as_json)


def _hyper(
    name: str | None, changes: Sequence[str], device: Device, out: Path, given: dict[str, Any], mode: str, as_json: bool
) -> None:
    from repkern.cli._runs import recipe_for, training_run
    from repkern.train.repopt import RepOptRecipe

    recipe, named = recipe_for(name or "repopt", RepOptRecipe, device, given, changes)
    if name is not None and given["search_epochs"] is None:
        recipe = recipe.model_copy(update={"search_epochs": recipe.train.epochs})
    to = Console(stderr=True, highlight=False) if as_json else _console.console()
    with training_run(out, recipe, mode, named, command="repkern search hyper", default=_OUT, to=to) as run:
        summary = _work(to, run, name)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))


def _work(to: Console, run: Run[RepOptRecipe], name: str | None) -> dict[str, Any]:
    from repkern.cli._progress import training_progress
    from repkern.cli._runs import shown, started
    from repkern.train.build import build_data
    from repkern.train.repopt import SCALES, run_hyper_search
    from repkern.train.reproducible import deterministic

    recipe = run.recipe
    started(to, run, f"the scales of {network_of(recipe)} on {images_of(recipe)},")
    with contextlib.ExitStack() as bars, deterministic(recipe.train.threads):
        progress = bars.enter_context(training_progress(to))
        scales, rows = run_hyper_search(
            recipe, build_data(recipe), run.path, callbacks=lambda name: [progress(f"{name:<8}")]
        )
    means = {name: round(scale.double().mean().item(), 4) for name, scale in scales.items()}
    summary = {
        "scales": str(run.path / SCALES), "layers": len({name.rpartition(".")[0] for name in scales}),
        "accuracy": rows[-1]["test_accuracy"], "means": means, "recipe": recipe.model_dump(mode="json"),
    }  # fmt: skip
    run.finish(summary)
    to.print(
        f"\n{summary['layers']} layers have scales, in {shown(run.path / SCALES)} (search accuracy "
        f"{percent(rows[-1]['test_accuracy'])}, which says little about what they are good for).",
        soft_wrap=True,
        markup=False,
    )
    if name is None:
        hint = "In your own training, with a fresh network:"
        line = f'optimizer = repkern.optim.from_scales(model, "{SCALES}", lr=0.1, momentum=0.9, weight_decay=4e-5)'
    else:
        hint = "A training with them:"
        line = f"repkern train {name} --set optimizer.name=repsgd --set optimizer.scales={shown(run.path / SCALES)}"
    to.print(f"\n{hint}", soft_wrap=True)
    to.print(f"  {line}", style="cyan", soft_wrap=True, markup=False)
    return summary
