"""`repkern bench blocks`: training multi-branch blocks against the same networks in plain torch modules."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repkern.bench import targets
from repkern.bench.memory import kept_bytes, peak_bytes
from repkern.bench.plain_blocks import plain_form
from repkern.bench.results import Row
from repkern.bench.timing import Workload, measure_pairs, quantiles, ratio_of_pairs, settle_allocator, strict_fp32
from repkern.bench.train import Trainer, make_trainer
from repkern.models import create_model
from repkern.nn.branch_sum import RECOMPUTE
from repkern.ops import use_backend

__all__ = ["DEFAULT_CASES", "BlocksCase", "BlocksOptions", "load_blocks", "parse_blocks", "run_blocks"]

DEFAULT_CASES = """
repvgg_a0_b16_128     repvgg_a0 repvgg 16 128
repvgg_a0_dbb_b16_128 repvgg_a0 dbb    16 128
resnet18_dbb_b16_128  resnet18  dbb    16 128
"""
_MIB = 2**20
# Sizes of the check: enough values a channel in the last stage for its statistics to mean something.
_CHECK_BATCH, _CHECK_SIZE = 4, 64
# float64, relative to the largest gradient of a parameter; the second, of all, for gradients that cancel to zero.
_ROUNDING, _CANCELLED = 1e-8, 1e-12
# How much further from the float64 gradients our float32 ones may be than the plain modules'.
_FURTHER = 4.0


@dataclass(frozen=True)
class BlocksCase:
    """A network of `repkern.create_model`, the kind of its blocks, and a batch of square images."""

    name: str
    model: str
    block: str
    batch: int
    size: int


@dataclass(frozen=True)
class BlocksOptions:
    """What to measure and how long."""

    backend: str = "auto"
    device: str = "cpu"
    pairs: int = 9
    channels_last: bool = False
    memory: bool = True
    model: Callable[[BlocksCase], nn.Module] = lambda case: create_model(case.model, block=case.block)


def parse_blocks(text: str, source: str = "shapes") -> list[BlocksCase]:
    """One `name model block batch size` a line, `#` starts a comment. ValueError names the line that cannot be read."""
    cases: list[BlocksCase] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 5 or not all(word.isdigit() and int(word) for word in words[3:]):
            raise ValueError(f"{source}, line {number}: wanted `name model block batch size`, got {line!r}")
        cases.append(BlocksCase(words[0], words[1], words[2], int(words[3]), int(words[4])))
    return cases


def load_blocks(path: Path | None) -> list[BlocksCase]:
    """The cases of a shapes file; the default ones without a path. OSError or ValueError when it cannot be read."""
    return parse_blocks(DEFAULT_CASES) if path is None else parse_blocks(path.read_text(), path.name)


@strict_fp32()
def run_blocks(
    cases: Sequence[BlocksCase], options: BlocksOptions, on_row: Callable[[Row], None], say: Callable[[str], None]
) -> list[str]:
    """Hand every row to `on_row` as soon as it is measured; return the failed checks in words."""
    settle_allocator()
    failures: list[str] = []
    for number, case in enumerate(cases, 1):
        say(f"[{number}/{len(cases)}] {case.name}: batch {case.batch}, {case.size} x {case.size}")
        torch.manual_seed(0)
        ours = options.model(case).to(options.device)
        with use_backend(options.backend):
            errors, wrong = _check(ours, options)
        if wrong:
            failures.append(f"{case.name}: {wrong}")
            continue
        if options.channels_last:
            ours = ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trainers = {
            name: make_trainer(model, case.batch, case.size, options.device, options.channels_last)
            for name, model in _variants(ours).items()
        }
        _measure_steps(case, trainers, errors, options, on_row)
        if options.memory:
            _measure_memory(case, trainers, options, on_row)
    return failures


def _variants(model: nn.Module) -> dict[str, nn.Module]:
    """The same network with each kind of recomputation, and plain."""
    variants: dict[str, nn.Module] = {}
    for recompute in RECOMPUTE:
        variants[recompute] = _with(copy.deepcopy(model), "recompute", recompute)
    variants["plain"] = plain_form(copy.deepcopy(model))
    return variants


def _with(model: nn.Module, option: str, value: str) -> nn.Module:
    for module in model.modules():
        if hasattr(module, option):
            setattr(module, option, value)
    return model


def _check(ours: nn.Module, options: BlocksOptions) -> tuple[dict[str, float], str]:
    """Gradients of every parameter, ours against the plain modules': errors over the bound, and what is wrong."""
    # As the plain modules pad inside a branch: by running statistics, without a gradient.
    variants = _variants(_with(copy.deepcopy(ours), "border", "released"))
    exact = {name: _gradients(copy.deepcopy(model).double(), options) for name, model in variants.items()}
    single = {name: _gradients(copy.deepcopy(model), options) for name, model in variants.items()}
    truth = exact["plain"]
    largest = max(float(g.abs().max()) for g in truth.values())
    distance = {name: _distance(gradients, truth) for name, gradients in single.items()}
    errors: dict[str, float] = {}
    for name in RECOMPUTE:
        for parameter, gradient in truth.items():
            difference = float((exact[name][parameter] - gradient).abs().max())
            bound = _ROUNDING * float(gradient.abs().max()) + _CANCELLED * largest
            if not difference <= bound:
                return errors, f"recompute={name}: float64 gradient of {parameter} differs by {difference:.3g}"
        errors[name] = distance[name] / (_FURTHER * distance["plain"])
        if not errors[name] <= 1:
            return errors, f"recompute={name}: float32 gradients are {errors[name]:.3g} times the bound from float64"
    return errors, ""


def _gradients(model: nn.Module, options: BlocksOptions) -> dict[str, Tensor]:
    trainer = make_trainer(model, _CHECK_BATCH, _CHECK_SIZE, options.device)
    dtype = next(model.parameters()).dtype
    nn.functional.cross_entropy(model(trainer.x.to(dtype)), trainer.y).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def _distance(gradients: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """|gradients - truth| / |truth| over all parameters."""
    off = sum(float((gradients[name] - wanted).square().sum()) for name, wanted in truth.items())
    return (off / sum(float(wanted.square().sum()) for wanted in truth.values())) ** 0.5


def _row(case: BlocksCase, options: BlocksOptions, kind: str, what: str, recompute: str) -> Row:
    label = case.block + (" recompute" if recompute == "cheap" else "")
    return Row(
        kind=kind, op="train_step", case=case.name, what=what, dtype="float32", device=options.device,
        mode="channels_last" if options.channels_last else "eager", backend=f"{label}/{options.backend}",
        baseline="plain",
    )  # fmt: skip


def _measure_steps(
    case: BlocksCase,
    trainers: Mapping[str, Trainer],
    errors: Mapping[str, float],
    options: BlocksOptions,
    on_row: Callable[[Row], None],
) -> None:
    works = {
        name: Workload(lambda _, trainer=trainer: trainer.step(), around=lambda: use_backend(options.backend))  # type: ignore[misc]
        for name, trainer in trainers.items()
    }
    samples = measure_pairs(works, pairs=options.pairs, device=options.device)
    for recompute in RECOMPUTE:
        p20, p50, p80 = (1e3 * value for value in quantiles(samples[recompute]))
        ratio = ratio_of_pairs(samples[recompute], samples["plain"])
        target = targets.blocks_target(options.device, case.name, recompute)
        on_row(dataclasses.replace(
            _row(case, options, "blocks", "step", recompute), ms_p20=p20, ms=p50, ms_p80=p80,
            baseline_ms=1e3 * quantiles(samples["plain"]).p50, ratio_p20=ratio.p20, ratio=ratio.p50,
            ratio_p80=ratio.p80, pairs=len(samples[recompute]), error_over_bound=errors[recompute],
            target=str(target or ""), verdict=targets.verdict(target, ratio.p50),
        ))  # fmt: skip


def _measure_memory(
    case: BlocksCase, trainers: Mapping[str, Trainer], options: BlocksOptions, on_row: Callable[[Row], None]
) -> None:
    kept: dict[str, int] = {}
    peak: dict[str, int] = {}
    for name, trainer in trainers.items():
        trainer.optimizer.zero_grad()
        with use_backend(options.backend):
            kept[name] = kept_bytes(trainer.loss, options.device)
            peak[name] = peak_bytes(trainer.step, trainer.resident(), options.device)
        trainer.optimizer.zero_grad()
    for recompute in RECOMPUTE:
        for what, bytes_of in (("activations", kept), ("peak", peak)):
            ratio = bytes_of[recompute] / bytes_of["plain"]
            of_kept = targets.activations_target(options.device, case.name, recompute)
            target = of_kept if what == "activations" else None
            on_row(dataclasses.replace(
                _row(case, options, "blocks-memory", what, recompute), extra_mib=bytes_of[recompute] / _MIB,
                limit_mib=bytes_of["plain"] / _MIB, ratio=ratio, target=str(target or ""),
                verdict=targets.verdict(target, ratio),
            ))  # fmt: skip
