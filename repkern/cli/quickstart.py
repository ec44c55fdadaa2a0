"""`repkern quickstart`: train plain and OREPA on real images, deploy, compare."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repkern.cli import _console
from repkern.cli._options import (
    TRAINING,
    Device,
    DeviceOption,
    Fresh,
    Number,
    Resume,
    Seed,
    Threads,
    check_extras,
    chosen_mode,
)

if TYPE_CHECKING:
    from rich.console import Console

    from repkern.train.recipe import Recipe
    from repkern.train.runs import Run

__all__ = ["quickstart"]

_EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", **TRAINING}
_OUT = Path("runs/quickstart")


def quickstart(
    device: DeviceOption = Device.auto,
    epochs: Annotated[Number, typer.Option(min=1, help="Epochs of each training.", show_default="32")] = None,
    out: Annotated[Path, typer.Option(help="Run folder; -2, -3, ... is added when it is taken.")] = _OUT,
    seed: Seed = None,
    threads: Threads = None,
    resume: Resume = False,
    fresh: Fresh = False,
) -> None:
    """See OREPA work: train on real images, deploy as plain convolutions.

    Trains one small residual network twice on scikit-learn's scanned digits,
    plain and with OREPA convolutions; turns the OREPA one back into a plain
    network, checks that both compute the same, and prints one table. Takes
    about two minutes on two cores. Ctrl-C loses nothing: the same command
    continues where it stopped.

    [bold]Examples[/]

    repkern quickstart                      the whole thing

    repkern quickstart --epochs 3           a quick look

    repkern quickstart --seed 1 --fresh     another run, kept beside the first
    """
    from repkern.cli._runs import recipe_for, training_run

    mode = chosen_mode(resume, fresh)
    check_extras("quickstart", _EXTRAS, "quickstart")
    from repkern.train.recipe import Recipe

    given = {"train.epochs": epochs, "train.seed": seed, "train.threads": threads}
    recipe, named = recipe_for("quickstart", Recipe, device, given)
    to = _console.console()
    with training_run(out, recipe, mode, named, command="repkern quickstart", default=_OUT, to=to) as run:
        _work(to, run)


def _work(console: Console, run: Run[Recipe]) -> None:
    from repkern.cli._progress import training_progress
    from repkern.cli._report import LABELS, print_report
    from repkern.cli._runs import shown, started
    from repkern.train.metrics import read_rows
    from repkern.train.quickstart import FORMS, run_quickstart
    from repkern.viz import plot_curves

    recipe = run.recipe
    started(console, run, "a small residual network on scanned 8x8 digits, plain and with OREPA,")
    with contextlib.ExitStack() as bars:
        progress = bars.enter_context(training_progress(console))

        def say(line: str) -> None:
            bars.close()  # a running bar would go on drawing, and disturb what is measured
            console.print(f"{line} ...", markup=False, soft_wrap=True)

        summary = run_quickstart(recipe, run.path, callbacks=lambda name: [progress(LABELS[name])], say=say)
    histories = {LABELS[name]: read_rows(run.path / name) for name in FORMS}
    smoothing = f" (label smoothing {recipe.loss.label_smoothing:g})" if recipe.loss.label_smoothing else ""
    plot_curves(histories, run.path / "curves.png", loss_label=f"cross-entropy{smoothing}")
    run.finish(summary)
    print_report(console, summary, shown(run.path))
