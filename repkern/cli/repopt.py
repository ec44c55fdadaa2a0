"""`repkern repopt`: hyper-search, then a RepOptimizer against SGD and RepVGG, and what INT8 leaves of each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from repkern.cli import _console
from repkern.cli._models import AsJson
from repkern.cli._options import (
    TRAINING,
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
    from torch import Tensor, nn

    from repkern.data import DataSource
    from repkern.train.repopt import RepOptRecipe
    from repkern.train.runs import Run

__all__ = ["repopt"]

_EXTRAS = {"matplotlib": "matplotlib", **TRAINING}
_OUT = Path("runs/repopt")
_CALIBRATION = 512  # images
_SCHEMES: dict[str, dict[str, Any]] = {"int8": {}, "int8_per_tensor": {"weights": "per_tensor"}}


def repopt(
    data: Data = None,
    model: Model = None,
    image_size: Size = None,
    epochs: Annotated[Number, typer.Option(min=1, help="Epochs of each training.", show_default="24")] = None,
    search_epochs: Annotated[Number, typer.Option(min=1, help="Epochs of the hyper-search.", show_default="12")] = None,
    device: DeviceOption = Device.auto,
    out: Annotated[Path, typer.Option(help="Run folder; -2, -3, ... is added when it is taken.")] = _OUT,
    seed: Seed = None,
    threads: Threads = None,
    resume: Resume = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """See RepOptimizers work: a plain network, its prior in the optimizer.

    First a hyper-search trains the network with scaled branches and keeps only
    the scales. Then the same plain 3x3 network is trained by SGD and by RepSGD,
    which multiplies gradients by those scales, and once each with the branches
    of RepVGG and QARepVGG. All end as plain convolutions; they are quantized to
    INT8, and one table shows accuracy, time and memory of a training step, and
    what INT8 costs. Takes about three minutes on two cores. Ctrl-C loses
    nothing: the same command continues where it stopped.

    [bold]Examples[/]

    repkern repopt                              the whole thing, on digits

    repkern repopt --epochs 3 --search-epochs 2 a quick look

    repkern repopt --data cifar10 --epochs 60   on your own images

    repkern repopt --seed 1 --fresh --json      another run, for a program
    """
    mode = chosen_mode(resume, fresh)
    check_extras("repopt", _EXTRAS | ({} if data else {"sklearn": "scikit-learn"}), "quickstart")
    check_model(model)
    given = {
        "train.epochs": epochs, "search_epochs": search_epochs, "train.seed": seed, "train.threads": threads,
        **images_and_network(data, image_size, model),
    }  # fmt: skip
    _repopt(device, out, given, mode, as_json)


def _repopt(device: Device, out: Path, given: dict[str, Any], mode: str, as_json: bool) -> None:
    from repkern.cli._runs import recipe_for, training_run
    from repkern.train.repopt import RepOptRecipe

    recipe, named = recipe_for("repopt", RepOptRecipe, device, given)
    to = Console(stderr=True, highlight=False) if as_json else _console.console()
    with training_run(out, recipe, mode, named, command="repkern repopt", default=_OUT, to=to) as run:
        summary = _work(to, run)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))


def _work(to: Console, run: Run[RepOptRecipe]) -> dict[str, Any]:
    from repkern.cli._progress import training_progress
    from repkern.cli._repopt_report import LABELS, print_report
    from repkern.cli._runs import shown, started
    from repkern.deploy.quantize_torchao import missing_torchao
    from repkern.train.metrics import read_rows
    from repkern.train.repopt import FORMS, run_repopt
    from repkern.viz import plot_curves

    recipe = run.recipe
    started(to, run, f"{network_of(recipe)}, by SGD and by a RepOptimizer, on {images_of(recipe)},")
    no_torchao = missing_torchao()
    with contextlib.ExitStack() as bars:
        progress = bars.enter_context(training_progress(to))

        def say(line: str) -> None:
            bars.close()  # a running bar would go on drawing, and disturb what is measured
            to.print(f"{line} ...", markup=False, soft_wrap=True)

        summary = run_repopt(
            recipe,
            run.path,
            callbacks=lambda name: [progress(f"{LABELS[name]:<8}")],
            say=say,
            quantize=_quantizer(run.path) if no_torchao is None else None,
        )
    plot_curves(
        {LABELS[name]: read_rows(run.path / name) for name in FORMS},
        run.path / "curves.png",
        loss_label=f"cross-entropy (label smoothing {recipe.loss.label_smoothing:g})",
    )
    run.finish(summary)
    print_report(to, summary, shown(run.path), no_torchao)
    return summary


def calibration_images(data: DataSource) -> Tensor:
    """The first training images of an epoch, augmented as in training: [N, C, H, W]."""
    import torch

    taken = 0
    batches = []
    for batch in data.train_batches(0):
        batches.append(batch.images)
        taken += len(batch.images)
        if taken >= _CALIBRATION:
            break
    return torch.cat(batches)[:_CALIBRATION]


def _quantizer(folder: Path) -> Callable[[Mapping[str, nn.Module], DataSource], dict[str, Any]]:
    """What `run_repopt` calls to quantize: losses and layers of every network, and two plots in `folder`."""

    def quantize(models: Mapping[str, nn.Module], data: DataSource) -> dict[str, Any]:
        import torch

        from repkern.cli._repopt_report import LABELS
        from repkern.deploy.quantize_compare import compare_quantized
        from repkern.train.quickstart import whole_test_set
        from repkern.viz import plot_kernels, plot_sensitivity

        images = calibration_images(data)
        tests = whole_test_set(data, torch.device("cpu"))
        losses, reports = compare_quantized(models, list(images.split(64)), tests, schemes=_SCHEMES)
        plot_sensitivity({LABELS[name]: report for name, report in reports.items()}, folder / "sensitivity.png")
        names = [layer.name for layer in reports["repvgg"].layers if layer.spread.centre is not None]
        layer = names[3 * len(names) // 4]  # deep, but not where a stage begins
        kernels = {LABELS[name]: model.get_parameter(f"{layer}.weight") for name, model in models.items()}
        plot_kernels(kernels, folder / "kernels.png", title=f"Deployed kernels of {layer}")
        return {
            **{scheme: {name: loss.as_json() for name, loss in of.items()} for scheme, of in losses.items()},
            "calibration_images": len(images),
            "layers": {name: report.as_json()["layers"] for name, report in reports.items()},
        }

    return quantize
