"""`repkern bench train`: a training step of ResNet-18, plain against OREPA in every convolution that can be one."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repkern.bench import targets
from repkern.bench.baselines import eager_kernel_of
from repkern.bench.memory import live_bytes, peak_bytes
from repkern.bench.problems import squeeze_problem
from repkern.bench.registry import Case
from repkern.bench.resnet import ResNet18
from repkern.bench.results import Row
from repkern.bench.timing import Workload, measure_pairs, quantiles, ratio_of_pairs, strict_fp32
from repkern.nn.convert import replace_convs
from repkern.nn.group import group_squeeze
from repkern.nn.orepa import OREPAConv2d
from repkern.ops import use_backend

__all__ = [
    "DEFAULT_STEPS",
    "EagerOREPA",
    "StepCase",
    "TrainOptions",
    "Trainer",
    "load_steps",
    "make_trainer",
    "parse_steps",
    "run_train",
]

DEFAULT_STEPS = """
resnet18_b32_224  32 224
resnet18_b16_128  16 128
"""
_MIB = 2**20
_COPIES = 3  # parameter, gradient, momentum
_SLACK = 1.05


@dataclass(frozen=True)
class StepCase:
    """A batch of square images."""

    name: str
    batch: int
    size: int


@dataclass(frozen=True)
class TrainOptions:
    """What to measure and how long."""

    backend: str = "auto"
    device: str = "cpu"
    pairs: int = 7
    channels_last: bool = False
    memory: bool = True
    grouped: bool = False
    model: Callable[[], nn.Module] = ResNet18


class EagerOREPA(nn.Module):
    """An OREPAConv2d that shares the parameters of `block` but makes its kernel the published, unfused way."""

    def __init__(self, block: OREPAConv2d) -> None:
        super().__init__()
        self.block = block
        self._kernel = eager_kernel_of(block.squeeze_branches(), lambda function: function)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of `x` with the kernel of `block`."""
        return self.block._conv(x, self._kernel(), self.block.bias)  # type: ignore[arg-type]


@dataclass
class Trainer:
    """A network in training, and the batch it sees in every step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    y: Tensor

    def step(self) -> None:
        """Gradients cleared, forward, loss, backward, update."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def loss(self) -> Tensor:
        """Forward and loss, ready for a backward."""
        return nn.functional.cross_entropy(self.model(self.x), self.y)

    def resident(self) -> list[Tensor]:
        """What lives between two steps once gradients are cleared."""
        momenta = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *momenta, self.x, self.y]


def parse_steps(text: str, source: str = "shapes") -> list[StepCase]:
    """One `name batch size` a line, `#` starts a comment. ValueError names the line that cannot be read."""
    cases: list[StepCase] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 3 or not all(word.isdigit() and int(word) for word in words[1:]):
            raise ValueError(f"{source}, line {number}: wanted `name batch size`, got {line!r}")
        cases.append(StepCase(words[0], int(words[1]), int(words[2])))
    return cases


def load_steps(path: Path | None) -> list[StepCase]:
    """The cases of a shapes file; the default ones without a path. OSError or ValueError when it cannot be read."""
    return parse_steps(DEFAULT_STEPS) if path is None else parse_steps(path.read_text(), path.name)


@strict_fp32()
def run_train(
    cases: Sequence[StepCase], options: TrainOptions, on_row: Callable[[Row], None], say: Callable[[str], None]
) -> list[str]:
    """Hand every row to `on_row` as soon as it is measured; return the failed checks in words."""
    models = _variants(options)
    blocks = [module for module in models["orepa"].modules() if isinstance(module, OREPAConv2d)]
    say(f"{len(blocks)} convolutions are OREPA")
    failures = _wrong_kernels(blocks, options)
    if failures:
        return failures
    for number, case in enumerate(cases, 1):
        say(f"[{number}/{len(cases)}] {case.name}: batch {case.batch}, {case.size} x {case.size}")
        trainers = {
            name: make_trainer(model, case.batch, case.size, options.device, options.channels_last)
            for name, model in models.items()
        }
        _measure_steps(case, trainers, options, on_row)
        if options.memory:
            _measure_memory(case, trainers, blocks, options, on_row)
    return []


def _variants(options: TrainOptions) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = options.model().to(options.device)
    if options.channels_last:
        plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    orepa = replace_convs(copy.deepcopy(plain))
    eager = copy.deepcopy(orepa)
    for name, module in list(eager.named_modules()):
        if isinstance(module, OREPAConv2d):
            parent, _, leaf = name.rpartition(".")
            setattr(eager.get_submodule(parent), leaf, EagerOREPA(module))
    variants = {"orepa": orepa, "plain": plain, "eager": eager}
    return variants | ({"grouped": group_squeeze(copy.deepcopy(orepa))} if options.grouped else {})


def _wrong_kernels(blocks: Sequence[OREPAConv2d], options: TrainOptions) -> list[str]:
    """Every block's kernel and gradients, ours and the published way, against the float64 reference."""
    layers = [block.squeeze_branches() for block in blocks]
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(options.device)

    problem = squeeze_problem(Case("model", "orepa_squeeze_many", ()), layers, random)
    failures: list[str] = []
    for name, forward in (("orepa", problem.ours), ("eager", problem.baseline(lambda function: function))):
        with _backend(options):
            result = problem.check(forward)
        if not result.ok:
            failures.append(f"{name}: kernel or gradient wrong: {result.where}, {result.worst:.3g} times the bound")
    return failures


def _backend(options: TrainOptions) -> contextlib.AbstractContextManager[None]:
    return use_backend(options.backend)


def make_trainer(model: nn.Module, batch: int, size: int, device: str = "cpu", channels_last: bool = False) -> Trainer:
    """`model` in train mode with SGD and a random batch of square images."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 3, size, size, generator=generator).to(device)
    y = torch.randint(0, 10, (batch,), generator=generator).to(device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    return Trainer(model.train(), optimizer, x, y)


def _label(name: str, options: TrainOptions) -> str:
    """The network's name in a row; ours with the backend that was asked for."""
    return name if name == "eager" else f"{'orepa grouped' if name == 'grouped' else name}/{options.backend}"


def _row(case: StepCase, options: TrainOptions, kind: str, what: str, backend: str) -> Row:
    mode = "channels_last" if options.channels_last else "eager"
    return Row(
        kind=kind, op="train_step", case=case.name, what=what, dtype="float32", device=options.device, mode=mode,
        backend=backend,
    )  # fmt: skip


def _measure_steps(
    case: StepCase, trainers: dict[str, Trainer], options: TrainOptions, on_row: Callable[[Row], None]
) -> None:
    works = {
        name: Workload(lambda _, trainer=trainer: trainer.step(), around=lambda: _backend(options))  # type: ignore[misc]
        for name, trainer in trainers.items()
    }
    samples = measure_pairs(works, pairs=options.pairs, device=options.device)
    for name in (name for name in samples if name != "plain"):
        p20, p50, p80 = (1e3 * value for value in quantiles(samples[name]))
        ratio = ratio_of_pairs(samples[name], samples["plain"])
        target = targets.train_target(options.device, case.name) if name != "eager" else None
        row = _row(case, options, "train", "step", _label(name, options))
        on_row(dataclasses.replace(
            row, ms_p20=p20, ms=p50, ms_p80=p80, baseline="plain", baseline_ms=1e3 * quantiles(samples["plain"]).p50,
            ratio_p20=ratio.p20, ratio=ratio.p50, ratio_p80=ratio.p80, pairs=options.pairs,
            target=str(target or ""), verdict=targets.verdict(target, ratio.p50),
        ))  # fmt: skip


def _measure_memory(
    case: StepCase,
    trainers: dict[str, Trainer],
    blocks: Sequence[nn.Module],
    options: TrainOptions,
    on_row: Callable[[Row], None],
) -> None:
    peaks: dict[str, int] = {}
    for name, trainer in trainers.items():
        trainer.optimizer.zero_grad()
        with _backend(options):
            peaks[name] = peak_bytes(trainer.step, trainer.resident(), options.device)
        trainer.optimizer.zero_grad()
    branches = live_bytes(parameter for block in blocks for parameter in block.parameters())
    added = live_bytes(trainers["orepa"].model.parameters()) - live_bytes(trainers["plain"].model.parameters())
    for name in (name for name in peaks if name != "plain"):
        extra = peaks[name] - peaks["plain"]
        for of_what, size in (("branch", branches), ("added", added)):
            limit = _SLACK * _COPIES * size
            target = targets.Target(limit / _MIB, f"MiB: {_COPIES} x {of_what} parameters + 5 %", at_most=True)
            row = _row(case, options, "memory", "peak", _label(name, options))
            on_row(dataclasses.replace(
                row, baseline="plain", extra_mib=extra / _MIB, limit_mib=limit / _MIB,
                target=str(target) if name != "eager" else "",
                verdict=targets.verdict(target, extra / _MIB) if name != "eager" else "",
            ))  # fmt: skip
