"""`repkern train`: a recipe, on one core or many machines."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from repkern.cli import _console
from repkern.cli._console import WRONG_USE, fail, percent
from repkern.cli._models import AsJson
from repkern.cli._options import (
    TRAINING,
    Changes,
    DataFolder,
    Device,
    DeviceOption,
    Fresh,
    Resume,
    Threads,
    check_extras,
    chosen_mode,
    whole_path,
)

if TYPE_CHECKING:
    from repkern.train.distributed import Runtime
    from repkern.train.recipe import Recipe
    from repkern.train.runs import Run

__all__ = ["train"]

_RUNS = Path("runs")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A name of `repkern recipes`, or a file: my.yaml.", show_default=False)
]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Run folder; -2, -3, ... is added when it is taken.", show_default="runs/NAME"),
]


def train(
    recipe: RecipeName,
    changes: Changes = None,
    data: DataFolder = None,
    out: Out = None,
    resume: Resume = False,
    fresh: Fresh = False,
    device: DeviceOption = Device.auto,
    threads: Threads = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the whole recipe, the layers and the memory it takes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a network as a recipe says.

    A recipe is a YAML file: network, blocks, data, optimizer, schedule. Many
    come with repkern, among them the rows of the papers' tables; your own can
    be a few lines over one of these (docs/recipes.md). Ctrl-C, a polite kill and
    a crash lose nothing that was saved: the same command continues at the very
    step. The run folder gets metrics, checkpoints and model.safetensors.

    [bold]Examples[/]

    repkern train digits_orepa                            a minute on two cores

    repkern train digits_orepa -s optimizer.lr=0.05 -s train.epochs=40

    repkern train my.yaml --data flowers --dry-run        what would be trained

    repkern train orepa_table4_resnet18_orepa --data /data/imagenet

    repkern eval runs/digits_orepa                        then

    [bold]Several processes or machines[/]

    torchrun --nproc-per-node 8 -m repkern train RECIPE   as a single one does
    """
    from repkern.cli._runs import recipe_for
    from repkern.train.recipe import Recipe

    check_extras("train", TRAINING, "train")
    mode = chosen_mode(resume, fresh)
    given = {"data.root": None if data is None else whole_path(data), "train.threads": threads}
    chosen, named = recipe_for(recipe, Recipe, device, given, changes or [])
    if data is not None and chosen.data.name == "digits":
        fail("--data: the digits come with scikit-learn; for a folder add --set data.name=folder", WRONG_USE)
    main = int(os.environ.get("RANK", "0")) == 0
    to = Console(stderr=True, highlight=False) if as_json else _console.console()
    if not main:
        to = Console(file=open(os.devnull, "w"))  # noqa: SIM115  for as long as the process lives
    if dry_run:
        _show(chosen, to, as_json)
        return
    default = _RUNS / (chosen.name or "train")
    command = f"repkern train {recipe}"
    with _run(out or default, chosen, mode, named, command, default, to) as (runtime, run):
        summary = _work(to, runtime, run)
    if as_json and main:
        typer.echo(json.dumps(summary, indent=2))


def _show(recipe: Recipe, to: Console, as_json: bool) -> None:
    from repkern.cli._preview import print_preview
    from repkern.train.distributed import world_size
    from repkern.train.preview import outline_of, preview

    try:
        found = preview(recipe, outline_of(recipe), processes=world_size())
    except (ValueError, OSError, ImportError, TypeError) as problem:
        fail(str(problem))
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        print_preview(to, found)


@contextlib.contextmanager
def _run(out: Path, recipe: Recipe, mode: Any, named: list[str], command: str, default: Path, to: Console) -> Any:
    """(runtime, run) of this process: rank 0 chooses and locks the folder, the others are told."""
    from repkern.cli._runs import training_run
    from repkern.train.distributed import Runtime, world_size
    from repkern.train.runs import open_run
    from repkern.train.shared_runs import share_run

    if world_size() == 1:
        alone = training_run(out, recipe, mode, named, command=command, default=default, to=to)
        with alone as run, Runtime(run.recipe.train) as runtime:
            yield runtime, run
        return
    with contextlib.ExitStack() as stack:
        try:
            runtime = stack.enter_context(Runtime(recipe.train))
        except (ValueError, RuntimeError, ImportError) as problem:
            fail(str(problem))
        opened = share_run(runtime, recipe, lambda: open_run(out, recipe, mode, named))
        run = stack.enter_context(
            training_run(out, recipe, mode, named, command=command, default=default, to=to, opened=opened)
        )
        yield runtime, run


def _work(to: Console, runtime: Runtime, run: Run[Recipe]) -> dict[str, Any]:
    from repkern.cli._progress import training_progress
    from repkern.cli._runs import shown, started
    from repkern.train.running import run_recipe

    started(to, run, what_is_trained(run.recipe), processes=runtime.world)
    with training_progress(to) as progress:
        summary = run_recipe(run.recipe, run.path, runtime, callbacks=[progress("train")])
    if runtime.is_main:
        _draw(run)
        run.finish(summary)
    _report(to, run, summary, shown(run.path))
    return summary


def _draw(run: Run[Recipe]) -> None:
    """curves.png in the run folder, where matplotlib is there to draw it."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from repkern.train.metrics import read_rows
    from repkern.viz import plot_curves

    smoothing = run.recipe.loss.label_smoothing
    label = "cross-entropy" + (f" (label smoothing {smoothing:g})" if smoothing else "")
    plot_curves({run.recipe.name or "train": read_rows(run.path)}, run.path / "curves.png", loss_label=label)


def what_is_trained(recipe: Recipe) -> str:
    """A recipe in a few words."""
    from repkern.train.recipe_list import block_of

    return f"{recipe.model.name} of {block_of(recipe)} on {recipe.data.root or recipe.data.name}"


def _report(to: Console, run: Run[Recipe], summary: dict[str, Any], folder: str) -> None:
    accuracy, best = percent(summary["accuracy"]), percent(summary["best_accuracy"])
    lines = [f"\nTest accuracy {accuracy}; the best was {best} after epoch {summary['best_epoch']}."]
    paper = run.recipe.paper
    if paper is not None and paper.top1 is not None:
        lines.append(f"The paper has {paper.top1:.2f} % ({paper.source}).")
    lines.append(f"\nThe network is in {folder}/model.safetensors.")
    lines.append(f"Test it again:   repkern eval {folder}")
    lines.append(f"Use it:          repkern predict IMAGE... --checkpoint {folder}")
    to.print("\n".join(lines), soft_wrap=True, markup=False)
