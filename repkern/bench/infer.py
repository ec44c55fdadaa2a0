"""`repkern bench infer`: deployed networks under optimize_for_inference against everything else that runs them."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repkern import deploy
from repkern.bench import rss, targets
from repkern.bench.deployed import calibrated, random_images
from repkern.bench.remote import Remote
from repkern.bench.results import Row
from repkern.bench.rivals import CONTESTANTS, OURS, Job, missing
from repkern.bench.timing import measure_pairs, quantiles, ratio_of_pairs
from repkern.models import save
from repkern.models.network import Network

__all__ = ["DEFAULT_MODELS", "InferOptions", "run_infer"]

DEFAULT_MODELS = ("repvgg_a0", "repvgg_a2", "repvgg_b1")
_MIB = 2**20
# Relative L2 error of the logits against float64: ours, and what disqualifies a rival.
_ALLOWED = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 2e-2}
_RIVAL_ALLOWED = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 2e-2}


@dataclass(frozen=True)
class InferOptions:
    """What to measure and how long. rivals: names of `CONTESTANTS` beside ours."""

    rivals: Sequence[str]
    batches: Sequence[int] = (1, 8)
    size: int = 224
    threads: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    pairs: int = 15
    min_sample_seconds: float = 0.05
    max_seconds: float = 30.0
    memory: bool = True
    width: float = 1.0


@dataclass(frozen=True)
class _Case:
    model: str
    batch: int
    options: InferOptions

    @property
    def name(self) -> str:
        return f"{self.model}_n{self.batch}_{self.options.size}"

    def row(self, kind: str, what: str, baseline: str) -> Row:
        dtype = {"fp32": "float32", "tf32": "tf32", "fp16": "float16"}[self.options.precision]
        return Row(
            kind=kind, op="optimize_for_inference", case=self.name, what=what, dtype=dtype, device=self.options.device,
            mode="eager", backend=OURS, baseline=baseline,
        )  # fmt: skip


def run_infer(
    models: Sequence[str], options: InferOptions, on_row: Callable[[Row], None], say: Callable[[str], None]
) -> list[str]:
    """Hand every row to `on_row` as soon as it is measured; return the failed checks in words.

    Logits of every contestant are compared with float64 before anything is timed: ours beyond the bound fail the run,
    a rival's leave it out. Samples are taken in turn, each contestant in a process of its own that sleeps meanwhile.
    ValueError for a model that is not known.
    """
    rivals = _installed(options, say)
    failures: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        remotes = {
            name: stack.enter_context(Remote(name, "repkern.bench.rivals:contestant", name, options.threads))
            for name in (OURS, *rivals)
        }
        for model in models:
            say(f"{model}: weights, norms and float64 logits")
            network = calibrated(model, size=options.size, width=options.width)
            save(network, folder / "network.safetensors")
            images = random_images(max(options.batches), options.size, seed=1)
            exact = _exact(network, images)
            for batch in options.batches:
                case = _Case(model, batch, options)
                job = _job(network, images[:batch], folder, case, rivals)
                failures += _run_case(case, job, exact[:batch], remotes, on_row, say)
                if options.memory and options.device == "cpu":
                    _measure_memory(case, job, on_row, say)
    return failures


def _installed(options: InferOptions, say: Callable[[str], None]) -> list[str]:
    found = []
    for name in options.rivals:
        lacking = missing(name)
        if lacking:
            say(f"{name} is left out: {', '.join(lacking)} not installed (pip install 'repkern[rivals]')")
        else:
            found.append(name)
    return found


@torch.inference_mode()
def _exact(network: Network, images: Tensor) -> np.ndarray:
    """Logits in float64, image by image: a batch of float64 maps of a large network would not fit small machines."""
    double = copy.deepcopy(network).double()
    return np.concatenate([double(image[None].double()).numpy() for image in images])


def _job(network: Network, images: Tensor, folder: Path, case: _Case, rivals: Sequence[str]) -> Job:
    np.save(folder / "images.npy", images.numpy())
    onnx = None
    if any(CONTESTANTS[name].onnx for name in rivals):
        onnx = str(folder / "network.onnx")
        deploy.export(network, onnx, images, dynamic_batch=False, verify=False)
    options = case.options
    return Job(str(folder / "network.safetensors"), str(folder / "images.npy"), onnx, options.device, options.precision)


def _run_case(
    case: _Case,
    job: Job,
    exact: np.ndarray,
    remotes: Mapping[str, Remote],
    on_row: Callable[[Row], None],
    say: Callable[[str], None],
) -> list[str]:
    say(f"{case.name}: {', '.join(remotes)} prepared and checked")
    errors: dict[str, float] = {}
    for name, logits in _prepared(job, remotes, say).items():
        error = float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
        allowed = (_ALLOWED if name == OURS else _RIVAL_ALLOWED)[case.options.precision]
        if error <= allowed:
            errors[name] = error
            continue
        message = f"{case.name}, {name}: logits are off by {error:.2e}, allowed {allowed:.0e}; not timed"
        if name == OURS:
            return [message]
        say(f"  {message}")
    say(f"  {OURS}: {remotes[OURS].call('chosen')}")
    samples = measure_pairs(
        {name: remotes[name].workload() for name in errors},
        pairs=case.options.pairs,
        min_sample_seconds=case.options.min_sample_seconds,
        max_seconds=case.options.max_seconds,
    )
    _rows(case, samples, errors[OURS] / _ALLOWED[case.options.precision], on_row, say)
    return []


def _prepared(job: Job, remotes: Mapping[str, Remote], say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Logits of all: rivals prepare side by side, ours alone behind them, because it chooses by timing."""
    rivals = [name for name in remotes if name != OURS]
    for name in rivals:
        remotes[name].ask("prepare", job)
    logits = {}
    for name in rivals:
        try:
            logits[name] = remotes[name].answer()
        except RuntimeError as problem:
            say(f"  {problem}: left out")
    return {OURS: remotes[OURS].prepare(job), **logits}


def _rows(
    case: _Case,
    samples: Mapping[str, list[float]],
    error: float,
    on_row: Callable[[Row], None],
    say: Callable[[str], None],
) -> None:
    """One row against every rival, and one against the best of them with the target."""
    rivals = [name for name in samples if name != OURS]
    rows = {}
    time = quantiles(samples[OURS])
    for name in rivals:
        ratio = ratio_of_pairs(samples[name], samples[OURS])
        rows[name] = dataclasses.replace(
            case.row("infer", "forward", name), ms_p20=1e3 * time.p20, ms=1e3 * time.p50, ms_p80=1e3 * time.p80,
            baseline_ms=1e3 * quantiles(samples[name]).p50, ratio_p20=ratio.p20, ratio=ratio.p50,
            ratio_p80=ratio.p80, pairs=len(samples[OURS]), error_over_bound=error,
        )  # fmt: skip
        on_row(rows[name])
    if not rivals:
        say(f"  {case.name}: {1e3 * time.p50:.2f} ms, nothing to compare with")
        return
    best = min(rivals, key=lambda name: quantiles(samples[name]).p50)
    target = targets.infer_target(case.options.device, case.model)
    row = rows[best]
    verdict = targets.verdict(target, row.ratio or 0.0)
    absent = [name for name in targets.INFER_RIVALS if name not in samples]
    if target is not None and absent:
        verdict += f" (without {', '.join(absent)})"
    on_row(dataclasses.replace(row, what="forward, best rival", target=str(target or ""), verdict=verdict))


def _measure_memory(case: _Case, job: Job, on_row: Callable[[Row], None], say: Callable[[str], None]) -> None:
    """Ours against the leaner memory format of torch eager, each in a fresh process."""
    if not rss.measured_here():
        say("  memory is not measured: this system does not let a process reset its high-water mark")
        return
    names = (OURS, "eager", "eager-last")
    with ExitStack() as stack:
        remotes = {
            name: stack.enter_context(Remote(name, "repkern.bench.rss:MemoryContestant", name, case.options.threads))
            for name in names
        }
        for remote in remotes.values():  # nothing is timed, so side by side
            remote.ask("prepare", job)
        found = {name: remote.answer() for name, remote in remotes.items()}
    for at, what in enumerate(("peak", "peak of preparation")):
        ours = found[OURS][at]
        name = min(("eager", "eager-last"), key=lambda name: found[name][at])
        plain = found[name][at]
        target = targets.infer_memory_target() if what == "peak" else None
        on_row(dataclasses.replace(
            case.row("infer-memory", what, name), extra_mib=ours / _MIB, limit_mib=plain / _MIB, ratio=ours / plain,
            target=str(target or ""), verdict=targets.verdict(target, ours / plain),
        ))  # fmt: skip
