"""Trainings of digits that are killed at random moments, resumed, and compared bit for bit with one that was not.

    python benchmarks/kills.py                      ten runs of each variant, each killed one to three times
    python benchmarks/kills.py --processes 2        under torchrun; one of the processes is killed, the other must end

A run ends for good when it was killed at a random step, or while it wrote a checkpoint, as often as was drawn. Weights,
moving average, optimizer, random states and rows (but for times) must equal those of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from repkern.bench.results import Row, append_row, default_file_name, environment
from repkern.train.build import build_data, build_trainer
from repkern.train.callbacks import Callback
from repkern.train.checkpoint import CheckpointFolder
from repkern.train.metrics import TIMES, read_rows
from repkern.train.recipe import Recipe

RESULTS = Path(__file__).resolve().parent / "results"
PATIENCE = 120  # seconds for anything that should happen
# What a training imports on its way; the server that runs are forked from has it once.
_IMPORTS = ["torchmetrics", "accelerate", "sklearn.datasets", "torch._dynamo", "repkern.train.build"]

_COMMON: dict[str, Any] = {
    "model": {"options": {"widths": [8, 16], "blocks": 1}},
    "data": {"augment": [{"name": "affine"}]},
    "train": {"epochs": 3, "batch_size": 64, "device": "cpu", "threads": 1},
    "checkpoint": {"every_steps": 8},
}
_OREPA = {**_COMMON["model"], "replace": {"block": "OREPAConv2d"}}
_EVERYTHING: dict[str, Any] = {  # moving average, accumulation, data workers, mixed labels, another optimizer
    **_COMMON,
    "model": _OREPA,
    "data": {**_COMMON["data"], "workers": 2, "mix": {"mixup": 0.2}},
    "train": {**_COMMON["train"], "accumulate": 2, "clip_norm": 5.0},
    "ema": {"decay": 0.99},
    "optimizer": {"name": "adamw", "lr": 0.003},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": _COMMON,
    "orepa": {**_COMMON, "model": _OREPA},
    "everything": _EVERYTHING,
    "writing": {**_EVERYTHING, "checkpoint": {"every_steps": 1, "keep": 1}},
}


# The training ---------------------------------------------------------------------------------------------------------


class Progress(Callback):
    """Appends "STEP PID" to a file after every step."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def on_fit_start(self, trainer: Any) -> None:
        self.on_step_end(trainer)

    def on_step_end(self, trainer: Any) -> None:
        self._file.write(f"{trainer.step} {os.getpid()}\n")
        self._file.flush()


def work(variant: str, folder: str, progress: str, epochs: str) -> None:
    """One process of a training, from wherever it is to its end."""
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in any other process
    # Data workers of a process that was killed complain before they end.
    os.dup2(os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    settings = VARIANTS[variant]
    recipe = Recipe.model_validate({**settings, "train": {**settings["train"], "epochs": int(epochs)}})
    data = build_data(recipe)
    with build_trainer(recipe, data, folder=Path(folder), callbacks=[Progress(Path(progress))]) as trainer:
        trainer.resume()
        trainer.fit()


@dataclass(frozen=True)
class Plan:
    """What is trained."""

    variant: str
    processes: int
    epochs: int


class Training:
    """A running training: in one process of a server that has everything imported, or in several under torchrun."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._progress = folder, folder / f"progress_{time.monotonic_ns()}"
        self._progress.touch()
        arguments = [plan.variant, str(folder), str(self._progress), str(plan.epochs)]
        self._one = self._many = None
        if plan.processes == 1:
            self._one = multiprocessing.get_context("forkserver").Process(target=work, args=arguments)
            self._one.start()
        else:
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={plan.processes}",
            ]
            log = (folder / "log").open("ab")
            self._many = subprocess.Popen([*launcher, __file__, "--work", *arguments], stdout=log, stderr=log)

    def lines(self) -> list[list[int]]:
        """[step, process] of every step so far."""
        text = self._progress.read_text()
        return [[int(part) for part in line.split()] for line in text[: text.rfind("\n") + 1].splitlines()]

    def running(self) -> bool:
        """Whether the launcher, or the only process, is there."""
        return self._one.is_alive() if self._one is not None else self._many.poll() is None  # type: ignore[union-attr]

    def wait(self) -> int:
        """The exit code. TimeoutError, after an end by force, when it takes too long."""
        until = time.monotonic() + PATIENCE
        while self.running() and time.monotonic() < until:
            time.sleep(0.01)
        if self.running():
            self.end()
            raise TimeoutError(f"{self.folder.name} did not end within {PATIENCE} s")
        return int(self._one.exitcode if self._one is not None else self._many.wait())  # type: ignore[union-attr, arg-type]

    def kill(self, chance: random.Random) -> None:
        """SIGKILL for one of the processes that train."""
        pids = [self._one.pid] if self._one is not None else sorted({pid for _, pid in self.lines()})
        if pids:
            os.kill(chance.choice(pids), signal.SIGKILL)  # type: ignore[arg-type]

    def end(self) -> None:
        """SIGKILL for all of them."""
        process: Any = self._one or self._many
        for pid in {process.pid, *(pid for _, pid in self.lines())}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


# The killing ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What was done to one training, and what came of it."""

    kills: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """For the table."""
        return f"DIFFERS in {', '.join(self.differing[:3])}" if self.differing else "identical"


def kill_somewhere(training: Training, chance: random.Random, last: int, *, writing: bool) -> str:
    """Kill it at a random step from here on, or while it writes; where that was, "" when it ended before."""
    target, pause = chance.randint(0, last - 1), chance.uniform(0, 0.01)
    while training.running():
        lines = training.lines()
        if lines and lines[-1][0] >= target:
            half = list((training.folder / "checkpoints").glob(".step_*.tmp"))
            if not writing or half:
                time.sleep(0 if half else pause)
                training.kill(chance)
                training.wait()
                left = any((training.folder / "checkpoints").glob(".step_*"))
                return f"{training.lines()[-1][0]}{' (writing)' if left else ''}"
        time.sleep(0.0002)
    return ""


def killed(plan: Plan, folder: Path, steps: int, chance: random.Random, *, times: int) -> Run:
    """One training, killed `times` times, then left to its end."""
    run = Run()
    while len(run.kills) < times:
        training = Training(plan, folder)
        where = kill_somewhere(training, chance, steps, writing=plan.variant == "writing")
        if where:
            run.kills.append(where)
        elif run.kills:  # it was resumed too close to its end
            break
    code = Training(plan, folder).wait()
    if code:
        run.differing.append(f"exit code {code}")
    return run


def newest(folder: Path) -> Any:
    """The last checkpoint, times aside."""
    checkpoints = CheckpointFolder(folder / "checkpoints")
    checkpoint = checkpoints.load(checkpoints.steps()[-1])
    state = {name: value for name, value in checkpoint.state.items() if name not in ("elapsed", "rows")}
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder)]]
    return {"weights": checkpoint.weights, "average": checkpoint.average, "state": state, "rows": rows}


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Dotted names of what is not the same to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield path
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for name in one:
            yield from differences(one[name], other[name], f"{path}.{name}".lstrip("."))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}.{index}")
    elif type(one) is not type(other) or repr(one) != repr(other):
        yield path


def run_all(plan: Plan, base: Path, count: int, chance: random.Random) -> list[Run]:
    """`count` killed runs beside the uninterrupted one."""
    whole = Training(plan, base / "whole")
    if whole.wait():
        raise RuntimeError(f"the uninterrupted run of {plan.variant} failed:\n{(whole.folder / 'log').read_text()}")
    wanted, steps = newest(whole.folder), whole.lines()[-1][0]
    runs = []
    for number in range(count):
        folder = base / str(number)
        run = killed(plan, folder, steps, chance, times=chance.randint(1, 3))
        if not run.differing:
            run.differing += differences(wanted, newest(folder))
        runs.append(run)
        print(f"{plan.variant:<12} {number + 1:>3}  killed at {', '.join(run.kills):<44} {run.verdict}", flush=True)
    return runs


def row_of(plan: Plan, runs: list[Run]) -> Row:
    """For the stored results."""
    same, kills = sum(not run.differing for run in runs), [kill for run in runs for kill in run.kills]
    halves = sum("writing" in kill for kill in kills)
    return Row(
        kind="kills",
        op=plan.variant,
        case=f"digits, {plan.processes} process{'es' if plan.processes > 1 else ''}",
        what=f"{len(kills)} kills, {halves} while a checkpoint was written",
        dtype="float32",
        device="cpu",
        mode="eager",
        backend="auto",
        baseline="uninterrupted",
        ratio=same / len(runs),
        pairs=len(runs),
        verdict=f"{same} of {len(runs)} bit-identical",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="killed runs of each variant")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3, help="of 22 steps each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--dry-run", action="store_true", help="store no rows")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return 0
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTS)
    chance, env, failed = random.Random(args.seed), environment(), 0
    for variant in args.variants:
        with tempfile.TemporaryDirectory() as base:
            plan = Plan(variant, args.processes, args.epochs)
            runs = run_all(plan, Path(base), args.runs, chance)
        row = row_of(plan, runs)
        failed += sum(bool(run.differing) for run in runs)
        print(f"{variant}: {row.what}, {row.verdict}")
        if not args.dry_run:
            append_row(RESULTS / default_file_name(env), env, row)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
