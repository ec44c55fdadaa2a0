"""The evidence table: short trainings with every kind of block, paired by seed; its plan and its stored rows.

`evidence_run` trains, `evidence_page` draws. A row is written once: the queue skips what is stored, so that it can be
continued for days.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from repkern.bench.evidence_networks import NETWORKS
from repkern.bench.results import Environment

__all__ = [
    "ARMS",
    "COMPARED",
    "INT8",
    "QUESTION",
    "SETTINGS",
    "Arm",
    "Case",
    "EvidenceRow",
    "Setting",
    "append_row",
    "definition",
    "pending",
    "plan",
    "read_evidence",
]

#: What an arm's name gets in the row of its network in INT8.
INT8 = ", INT8"


@dataclass(frozen=True)
class Setting:
    """What all arms have in common. images: how many of the training images, the first ones. recipe: fields of
    `TrainingRecipe`, by section.
    """

    name: str
    data: str
    images: int
    recipe: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Arm:
    """One way of training. recipe: what differs from the setting's, by section.

    searched: by RepSGD, after a hyper-search as long as the training. start: kind of block whose fresh kernels this
    network starts with, "" for its own. kernel: factor on the first kernels, put into the weights that they are linear
    in. int8: also quantized after training.
    """

    name: str
    block: str = "conv_bn"
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    searched: bool = False
    start: str = ""
    kernel: float = 1.0
    int8: bool = False

    @property
    def rows(self) -> tuple[str, ...]:
        """The names of the rows that one run of this arm gives."""
        return (self.name, self.name + INT8) if self.int8 else (self.name,)


class Case(NamedTuple):
    """One run."""

    arm: Arm
    network: str
    seed: int
    setting: Setting


@dataclass(frozen=True)
class EvidenceRow:
    """What one run gave. accuracy: percent of the whole test set. seconds: of training alone; cpu_seconds: what its
    threads computed in them, whoever else was computing too; search_seconds: the same of the hyper-search before it.
    peak_mib: the most resident memory of the training above that before its first step. definition: a sum over what
    the names of arm, network and setting stand for.
    """

    arm: str
    network: str
    setting: str
    seed: int
    accuracy: float
    test_loss: float | None
    train_loss: float | None
    seconds: float | None
    cpu_seconds: float | None
    search_seconds: float | None
    peak_mib: float | None
    parameters: int
    definition: str


COLUMNS = [column.name for column in (*fields(Environment), *fields(EvidenceRow))]

_SHORT: dict[str, dict[str, Any]] = {
    "train": {"epochs": 4, "batch_size": 128, "device": "cpu", "channels_last": True, "eval_every": 4},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4},
    "schedule": {"name": "onecycle"},
}
_LONGER = {**_SHORT, "train": {**_SHORT["train"], "epochs": 12, "eval_every": 12}}

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("fashion 12k, 4 epochs", "fashion_mnist", 12_000, _SHORT),
        Setting("fashion 12k, 12 epochs", "fashion_mnist", 12_000, _LONGER),
        Setting("cifar10 (JPEG copy) 12k, 4 epochs", "cifar10_jpeg", 12_000, _SHORT),
    )
}


ARMS = {
    arm.name: arm
    for arm in (
        Arm("plain", int8=True),
        Arm("ACB", "acb"),
        Arm("DBB", "dbb"),
        Arm("RepVGG", "repvgg", int8=True),
        Arm("OREPA", "orepa"),
        Arm("OREPA, scales decayed", "orepa", recipe={"optimizer": {"decay_scales": True}}),
        Arm("OREPA, scalar", "orepa", {"scaling": "scalar"}),
        Arm("OREPA, no scaling", "orepa", {"scaling": "none"}),
        Arm("RepOpt", searched=True, int8=True),
        Arm("plain, from OREPA's kernels", start="orepa"),
        Arm("plain, kernels x 3.33", kernel=10 / 3),
        Arm("OREPA, initial plain", "orepa", {"initial": "plain"}),
        Arm("OREPA, from plain kernels", "orepa", start="conv_bn"),
        Arm("OREPA, lr 1.0", "orepa", recipe={"optimizer": {"lr": 1.0}}),
        Arm("plain, lr 1.0", recipe={"optimizer": {"lr": 1.0}}),
    )
}

#: Those that compare ways of training; the other arms are there for the question below the table.
COMPARED = tuple(ARMS)[:9]
#: Why OREPA is below plain in a short training.
QUESTION = ("plain", "OREPA", *tuple(ARMS)[9:])


def plan(
    networks: Sequence[str], seeds: Iterable[int], setting: Setting, arms: Sequence[str] | None = None
) -> Iterator[Case]:
    """All arms (by default COMPARED) of a seed before the next seed, so that an interrupted queue leaves pairs.

    ValueError for unknown names.
    """
    names = list(COMPARED) if arms is None else list(arms)
    for kind, wanted, known in (("arm", names, list(ARMS)), ("network", networks, list(NETWORKS))):
        for name in wanted:
            if name not in known:
                raise ValueError(f"{kind} must be one of {'; '.join(known)}, got {name!r}")
    for network in networks:
        for seed in seeds:
            for name in names:
                yield Case(ARMS[name], network, seed, setting)


def definition(arm: Arm, network: str, setting: Setting) -> str:
    """Eight hex digits that change when the arm or the setting comes to mean something else."""
    text = json.dumps([asdict(arm), network, asdict(setting)], sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def pending(cases: Iterable[Case], stored: Sequence[Mapping[str, str]]) -> Iterator[Case]:
    """The cases of which a row is missing.

    ValueError when a stored row of the same names had another definition: it would be compared with what it is not.
    """
    found = {(row["arm"], row["network"], row["setting"], int(row["seed"])) for row in stored}
    meant = {(row["arm"], row["network"], row["setting"]): row["definition"] for row in stored}
    for case in cases:
        now = definition(case.arm, case.network, case.setting)
        for name in case.arm.rows:
            before = meant.get((name, case.network, case.setting.name), now)
            if before != now:
                raise ValueError(
                    f"stored rows of {name!r} on {case.network!r} in {case.setting.name!r} have definition {before}, "
                    f"now it is {now}: give what changed another name"
                )
        if any((name, case.network, case.setting.name, case.seed) not in found for name in case.arm.rows):
            yield case


def append_row(path: Path, env: Environment, row: EvidenceRow) -> None:
    """Write one row and close the file. ValueError when it has other columns."""
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        read_evidence(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in {**asdict(env), **asdict(row)}.items()})


def read_evidence(path: Path) -> list[dict[str, str]]:
    """All rows, as text; none when there is no file. ValueError when it has other columns."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if rows and reader.fieldnames != COLUMNS:
        raise ValueError(f"{path.name} has other columns than this version of repkern writes; choose a new file")
    return rows


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
