"""What commands with a run folder share: settings from options, and what happens when a run is interrupted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer

from repkern.cli import _console
from repkern.cli._console import INTERRUPTED, WRONG_USE, fail
from repkern.cli.quickstart import Device
from repkern.train.config import TrainConfig
from repkern.train.runs import Run

__all__ = ["read_rows", "settings", "shown", "started", "training_run"]

ConfigT = TypeVar("ConfigT", bound=TrainConfig)


def settings(kind: type[ConfigT], device: Device, given: dict[str, Any]) -> tuple[ConfigT, list[str]]:
    """The settings, and the names of those that the user gave. Leaves with 2 for a GPU that is not there."""
    import torch

    gpu = torch.cuda.is_available()
    if device is Device.cuda and not gpu:
        fail("--device cuda: no CUDA GPU or driver was found; --device cpu works everywhere", WRONG_USE)
    where = ("cuda" if gpu else "cpu") if device is Device.auto else device.value
    values: dict[str, Any] = {"threads": torch.get_num_threads(), "device": where, **given}
    return kind(**values), [*given, *([] if device is Device.auto else ["device"])]


@contextlib.contextmanager
def training_run(
    out: Path, config: ConfigT, mode: Any, given: Sequence[str], *, command: str, default: Path, to: Any
) -> Iterator[Run[ConfigT]]:
    """`open_run`, with every way it can end as an exit code and one line; Ctrl-C says how to continue.

    command, default: of the words that continue the run. to: the console for what is said.
    """
    from repkern.train import CheckpointError, Interrupted, TrainingDivergedError
    from repkern.train.data import MissingExtraError
    from repkern.train.runs import RunError, open_run

    try:
        with _console.terminated_like_ctrl_c(), open_run(out, config, mode, given) as run:
            try:
                for note in run.notes:
                    to.print(note, style="dim", soft_wrap=True, markup=False)
                yield run
            except (Interrupted, KeyboardInterrupt):
                option = "" if out == default else f" --out {out}"
                to.print(
                    f"\nInterrupted. Every finished epoch is safe in {shown(run.path)}.\n"
                    f"The same command continues there, and so does: {command} --resume{option}",
                    soft_wrap=True,
                    markup=False,
                )
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


def started(to: Any, run: Run[Any], what: str) -> None:
    """The first lines: what is trained on what, and where the results go."""
    config = run.config
    where = "the GPU" if config.device == "cuda" else f"{config.threads} CPU threads"
    to.print(
        f"{'Continuing' if run.resumed else 'Training'} {what} on {where}.\n"
        f"Results go to {shown(run.path)}. Ctrl-C is safe: the same command continues.\n",
        soft_wrap=True,
        markup=False,
    )


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of one training."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def shown(path: Path) -> str:
    """Relative to the current folder where that is shorter to read."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
