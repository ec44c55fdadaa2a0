"""One run of the evidence table: a training with the engine, its test accuracy, and INT8 of what it gave."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repkern.bench.evidence import INT8, Case, EvidenceRow, definition
from repkern.bench.evidence_data import EvidenceData
from repkern.bench.evidence_networks import make_network
from repkern.bench.rss import high_water_bytes, measured_here, resident_bytes
from repkern.data.source import ImageSource
from repkern.deploy.quantize import evaluate, quantize
from repkern.nn import OREPAConv2d
from repkern.optim import from_scales, weight_decay_groups
from repkern.search import HyperSearch
from repkern.train.callbacks import Callback
from repkern.train.recipe import TrainingRecipe
from repkern.train.reproducible import seed_everything
from repkern.train.trainer import Trainer

__all__ = ["first_network", "run"]

_CALIBRATION = 512
_OF_TRAINING = ("train_loss", "seconds", "cpu_seconds", "search_seconds", "peak_mib")
_DRAWS = 1_000_003  # seeds of values that only some arms draw are apart from those of the networks
# The weights that a squeezed kernel is linear in, each of one branch.
_LAST = ("origin", "avg", "prior", "pointwise", "expand", "project")


class _Watch(Callback):
    """Time and the most memory from the first step to the end of the last, without the test."""

    seconds = cpu_seconds = 0.0
    peak_mib: float | None = None

    def on_fit_start(self, trainer: Any) -> None:
        """Starts it."""
        self._resident = resident_bytes() if measured_here() else None  # asking resets the high-water mark
        self._began = time.perf_counter(), time.process_time()

    def on_step_end(self, trainer: Any) -> None:
        """Reads it."""
        wall, cpu = self._began
        self.seconds, self.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        if trainer.step == trainer.total_steps and self._resident is not None:
            self.peak_mib = (high_water_bytes() - self._resident) / 2**20


def run(case: Case, data: EvidenceData) -> Iterator[EvidenceRow]:
    """Train and test; the row of the network, then the one in INT8 where the arm has it.

    TrainingDivergedError as the engine; ImportError without the packages of the extras train and quantize.
    """
    recipe = _recipe(case)
    source = data.source(case.seed, recipe.train.batch_size)
    model, optimizer, searching = _prepared(case, recipe, source)
    _warm_up(model, recipe, data)
    last, watch = _train(model, recipe, source, optimizer)
    row = EvidenceRow(
        arm=case.arm.name, network=case.network, setting=case.setting.name, seed=case.seed,
        accuracy=100 * last["test_accuracy"], test_loss=last["test_loss"], train_loss=last["train_loss"],
        seconds=watch.seconds, cpu_seconds=watch.cpu_seconds, search_seconds=searching, peak_mib=watch.peak_mib,
        parameters=sum(p.numel() for p in model.parameters()),
        definition=definition(case.arm, case.network, case.setting),
    )  # fmt: skip
    yield row
    if case.arm.int8:
        yield _quantized(row, model, source)


def _recipe(case: Case) -> TrainingRecipe:
    sections: dict[str, Any] = {name: dict(section) for name, section in case.setting.recipe.items()}
    for name, section in case.arm.recipe.items():
        sections.setdefault(name, {}).update(section)
    sections["train"] = {**sections.get("train", {}), "seed": case.seed, "threads": torch.get_num_threads()}
    return TrainingRecipe(**sections)


def _warm_up(model: nn.Module, recipe: TrainingRecipe, data: EvidenceData) -> None:
    """One step of a copy: what is loaded and prepared once a process belongs to no arm's memory and time."""
    settings = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 1})})
    few = dataclasses.replace(data, test=data.test.take(torch.arange(8)))
    _train(copy.deepcopy(model), settings, few.source(0, recipe.train.batch_size), None)


def _train(
    model: nn.Module, recipe: TrainingRecipe, source: ImageSource, optimizer: torch.optim.Optimizer | None
) -> tuple[Mapping[str, Any], _Watch]:
    """The row of the last epoch, and what was watched."""
    watch = _Watch()
    optimizers = None if optimizer is None else {"weights": optimizer}
    with Trainer(model, source, recipe, optimizers=optimizers, callbacks=[watch]) as trainer:
        return trainer.fit()[-1], watch


def _prepared(
    case: Case, recipe: TrainingRecipe, source: ImageSource
) -> tuple[nn.Module, torch.optim.Optimizer | None, float | None]:
    """The network with its first values, its optimizer if it is not the recipe's, the CPU seconds of its search."""
    arm = case.arm
    model = first_network(case, source.channels, len(source.classes))
    if not arm.searched:
        return model, None, None
    search = HyperSearch(model)
    wanted = recipe.optimizer
    momentum: dict[str, Any] = {"momentum": wanted.momentum, "nesterov": wanted.nesterov}
    groups = weight_decay_groups(search.model, wanted.weight_decay)
    _, watch = _train(search.model, recipe, source, torch.optim.SGD(groups, wanted.lr, **momentum))
    optimizer = from_scales(model, search.scales(), lr=wanted.lr, weight_decay=wanted.weight_decay, **momentum)
    return model, optimizer, watch.cpu_seconds


def first_network(case: Case, channels: int, classes: int) -> nn.Module:
    """The network of a case with its first values, which are a function of arm, network and seed."""
    arm = case.arm
    seed_everything(case.seed)
    model = make_network(case.network, arm.block, channels, classes, **arm.options)
    seed_everything(case.seed + _DRAWS)
    with torch.no_grad():
        if arm.start:
            _start_as(model, make_network(case.network, arm.start, channels, classes))
        for conv in _convolutions(model) if arm.kernel != 1 else ():
            for weight in _last_weights(conv):
                weight.mul_(arm.kernel)
    return model


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """The 3x3 ones whose kernels arms change: plain ones and OREPA's."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def _last_weights(conv: nn.Conv2d) -> list[Tensor]:
    if not isinstance(conv, OREPAConv2d):
        return [conv.weight]
    holders = (getattr(conv, name) for name in _LAST)
    return [holder.weight for holder in holders if holder is not None]


def _start_as(model: nn.Module, plain: nn.Module) -> None:
    for conv, wanted in zip(_convolutions(model), _convolutions(plain), strict=True):
        conv.weight.copy_(wanted.weight)


def _quantized(row: EvidenceRow, model: nn.Module, source: ImageSource) -> EvidenceRow:
    """The same network in INT8, calibrated on training images."""
    batches = itertools.islice(source.train_batches(0), math.ceil(_CALIBRATION / source.batch_size))
    found = evaluate(quantize(model.eval(), batches), source.test_batches())
    fields = {**vars(row), "arm": row.arm + INT8, "accuracy": 100 * found["accuracy"], "test_loss": found["loss"]}
    return EvidenceRow(**{**fields, **dict.fromkeys(_OF_TRAINING)})
