"""`repkern quickstart`: train plain and OREPA on real images, deploy, compare."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from repkern.cli import _console
from repkern.cli._console import INTERRUPTED, WRONG_USE, fail

if TYPE_CHECKING:
    from rich.console import Console

    from repkern.train.quickstart import QuickstartConfig
    from repkern.train.runs import Run

__all__ = ["quickstart"]

_EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


class Device(str, Enum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


# Optional[...] because typer evaluates the annotations, and Python 3.10 with `from __future__` is fine with either.
Number = Optional[int]  # noqa: UP045


def quickstart(
    device: Annotated[Device, typer.Option(help="auto: the GPU when there is one.")] = Device.auto,
    epochs: Annotated[Number, typer.Option(min=1, help="Epochs of each training.", show_default="32")] = None,
    out: Annotated[Path, typer.Option(help="Run folder; -2, -3, ... is added when it is taken.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[
        Number,
        typer.Option(min=0, max=2**32 - 1, help="Seed of weights, data order and augmentation.", show_default="0"),
    ] = None,
    threads: Annotated[
        Number, typer.Option(min=1, help="CPU threads; results repeat for the same number.", show_default="all cores")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only continue the newest unfinished run.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new run in any case.")] = False,
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
    if resume and fresh:
        fail("--resume and --fresh contradict each other", WRONG_USE)
    missing = [_EXTRAS[name] for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"quickstart needs {' and '.join(missing)}: pip install 'repkern[quickstart]'")
    chosen = {"epochs": epochs, "seed": seed, "threads": threads}
    given = {name: value for name, value in chosen.items() if value is not None}
    _quickstart(device, out, given, "resume" if resume else "fresh" if fresh else "auto")


def _quickstart(device: Device, out: Path, given: dict[str, int], mode: Any) -> None:
    from repkern.train import CheckpointError, Interrupted, TrainingDivergedError
    from repkern.train.data import MissingExtraError
    from repkern.train.runs import RunError, open_run

    config, named = _config(device, given)
    try:
        with _console.terminated_like_ctrl_c(), open_run(out, config, mode, named) as run:
            try:
                _work(_console.console(), run)
            except (Interrupted, KeyboardInterrupt):
                _say_how_to_resume(run.path, out)
                raise typer.Exit(INTERRUPTED) from None
            except CheckpointError as error:
                fail(
                    f"{error}. Nothing was changed. Start anew with --fresh, or delete that checkpoint to go on "
                    "from the one before it."
                )
    except RunError as error:
        fail(str(error), WRONG_USE)
    except (MissingExtraError, TrainingDivergedError, OSError, ValueError) as error:
        fail(str(error))


def _config(device: Device, given: dict[str, int]) -> tuple[QuickstartConfig, list[str]]:
    """The settings, and the names of those that the user gave."""
    import torch

    from repkern.train.quickstart import QuickstartConfig

    gpu = torch.cuda.is_available()
    if device is Device.cuda and not gpu:
        fail("--device cuda: no CUDA GPU or driver was found; --device cpu works everywhere", WRONG_USE)
    where = ("cuda" if gpu else "cpu") if device is Device.auto else device.value
    values: dict[str, Any] = {"threads": torch.get_num_threads(), "device": where, **given}
    return QuickstartConfig(**values), [*given, *([] if device is Device.auto else ["device"])]


def _work(console: Console, run: Run[QuickstartConfig]) -> None:
    from repkern.cli._progress import training_progress
    from repkern.cli._report import LABELS, print_report
    from repkern.train.quickstart import FORMS, run_quickstart
    from repkern.viz import plot_curves

    for note in run.notes:
        console.print(note, style="dim", soft_wrap=True, markup=False)
    config = run.config
    where = "the GPU" if config.device == "cuda" else f"{config.threads} CPU threads"
    verb = "Continuing" if run.resumed else "Training"
    console.print(
        f"{verb} a small residual network on scanned 8x8 digits, plain and with OREPA, on {where}.\n"
        f"Results go to {_shown(run.path)}. Ctrl-C is safe: the same command continues.\n",
        soft_wrap=True,
        markup=False,
    )
    with contextlib.ExitStack() as bars:
        progress = bars.enter_context(training_progress(console))

        def say(line: str) -> None:
            bars.close()  # a running bar would go on drawing, and disturb what is measured
            console.print(f"{line} ...", markup=False, soft_wrap=True)

        summary = run_quickstart(config, run.path, callbacks=lambda name: [progress(LABELS[name])], say=say)
    histories = {LABELS[name]: _rows(run.path / name / "metrics.jsonl") for name in FORMS}
    smoothing = f" (label smoothing {config.label_smoothing:g})" if config.label_smoothing else ""
    plot_curves(histories, run.path / "curves.png", loss_label=f"cross-entropy{smoothing}")
    run.finish(summary)
    print_report(console, summary, _shown(run.path))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _shown(path: Path) -> str:
    """Relative to the current folder where that is shorter to read."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _say_how_to_resume(path: Path, out: Path) -> None:
    option = "" if out == Path("runs/quickstart") else f" --out {out}"
    _console.console().print(
        f"\nInterrupted. Every finished epoch is safe in {_shown(path)}.\n"
        f"The same command continues there, and so does: repkern quickstart --resume{option}",
        soft_wrap=True,
        markup=False,
    )
