"""`repkern repopt`: hyper-search, then a RepOptimizer against SGD and RepVGG, and what INT8 leaves of each."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from repkern.cli import _console
from repkern.cli._console import WRONG_USE, fail
from repkern.cli._models import AsJson
from repkern.cli.quickstart import Device

if TYPE_CHECKING:
    from torch import nn

    from repkern.train.data import DigitsData
    from repkern.train.repopt import RepOptConfig
    from repkern.train.runs import Run

__all__ = [
    "Data",
    "DeviceOption",
    "Fresh",
    "Model",
    "Number",
    "Resume",
    "Seed",
    "Size",
    "Threads",
    "check_model",
    "chosen",
    "repopt",
]

_EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
_OUT = Path("runs/repopt")
_CALIBRATION = 512  # images
_SCHEMES: dict[str, dict[str, Any]] = {"int8": {}, "int8_per_tensor": {"weights": "per_tensor"}}

# Optional[...] because typer evaluates the annotations, and Python 3.10 with `from __future__` is fine with either.
Number = Optional[int]  # noqa: UP045
Folder = Optional[Path]  # noqa: UP045
Data = Annotated[
    Folder,
    typer.Option(
        metavar="FOLDER",
        exists=True,
        file_okay=False,
        help="Images to use: FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png.",
        show_default="scikit-learn's digits",
    ),
]
Model = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME", help="A network of `repkern models`, made of 3x3 layers.", show_default="a small VGG"),
]
Size = Annotated[Number, typer.Option(min=8, help="Side that those images get.", show_default="32")]
DeviceOption = Annotated[Device, typer.Option(help="auto: the GPU when there is one.")]
Seed = Annotated[
    Number, typer.Option(min=0, max=2**32 - 1, help="Seed of weights, order and augmentation.", show_default="0")
]
Threads = Annotated[
    Number, typer.Option(min=1, help="CPU threads; results repeat for the same number.", show_default="all cores")
]
Resume = Annotated[bool, typer.Option("--resume", help="Only continue the newest unfinished run.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start a new run in any case.")]


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
    mode = chosen(resume, fresh, data)
    check_model(model)
    given = {
        "epochs": epochs, "search_epochs": search_epochs, "seed": seed, "threads": threads,
        "data": None if data is None else str(data.absolute()), "image_size": image_size, "model": model,
    }  # fmt: skip
    _repopt(device, out, {name: value for name, value in given.items() if value is not None}, mode, as_json)


def chosen(resume: bool, fresh: bool, data: Path | None) -> str:
    """The mode of `open_run`. Leaves with a line for options that contradict, and for packages that are missing."""
    if resume and fresh:
        fail("--resume and --fresh contradict each other", WRONG_USE)
    needed = {name: shown for name, shown in _EXTRAS.items() if name != "sklearn" or data is None}
    missing = [shown for name, shown in needed.items() if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"this needs {' and '.join(missing)}: pip install 'repkern[quickstart]'")
    return "resume" if resume else "fresh" if fresh else "auto"


def check_model(name: str | None) -> None:
    """Leave with 2 for a network that does not exist."""
    from repkern.models import default_block

    if name is not None:
        try:
            default_block(name)
        except ValueError as problem:
            fail(str(problem), WRONG_USE)


def _repopt(device: Device, out: Path, given: dict[str, Any], mode: str, as_json: bool) -> None:
    from repkern.cli._runs import settings, training_run
    from repkern.train.repopt import RepOptConfig

    config, named = settings(RepOptConfig, device, given)
    to = Console(stderr=True, highlight=False) if as_json else _console.console()
    with training_run(out, config, mode, named, command="repkern repopt", default=_OUT, to=to) as run:
        summary = _work(to, run)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))


def _work(to: Console, run: Run[RepOptConfig]) -> dict[str, Any]:
    from repkern.cli._progress import training_progress
    from repkern.cli._repopt_report import LABELS, print_report
    from repkern.cli._runs import read_rows, shown, started
    from repkern.deploy.quantize_torchao import missing_torchao
    from repkern.train.repopt import FORMS, run_repopt
    from repkern.viz import plot_curves

    config = run.config
    started(
        to,
        run,
        f"{config.model or 'a small VGG'}, by SGD and by a RepOptimizer, on {config.data or 'scanned 8x8 digits'},",
    )
    no_torchao = missing_torchao()
    with contextlib.ExitStack() as bars:
        progress = bars.enter_context(training_progress(to))

        def say(line: str) -> None:
            bars.close()  # a running bar would go on drawing, and disturb what is measured
            to.print(f"{line} ...", markup=False, soft_wrap=True)

        summary = run_repopt(
            config,
            run.path,
            callbacks=lambda name: [progress(f"{LABELS[name]:<8}")],
            say=say,
            quantize=_quantizer(run.path) if no_torchao is None else None,
        )
    plot_curves(
        {LABELS[name]: read_rows(run.path / name) for name in FORMS},
        run.path / "curves.png",
        loss_label=f"cross-entropy (label smoothing {config.label_smoothing:g})",
    )
    run.finish(summary)
    print_report(to, summary, shown(run.path), no_torchao)
    return summary


def _quantizer(folder: Path) -> Callable[[Mapping[str, nn.Module], DigitsData], dict[str, Any]]:
    """What `run_repopt` calls to quantize: losses and layers of every network, and two plots in `folder`."""

    def quantize(models: Mapping[str, nn.Module], data: DigitsData) -> dict[str, Any]:
        from repkern.cli._repopt_report import LABELS
        from repkern.deploy.quantize_compare import compare_quantized
        from repkern.viz import plot_kernels, plot_sensitivity

        images = data.train_images[:_CALIBRATION].cpu()
        losses, reports = compare_quantized(
            models, list(images.split(64)), (data.test_images, data.test_labels), schemes=_SCHEMES
        )
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
