"""The metrics of one epoch: what a task's torchmetrics have summed up, in every process."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repkern.train.task import Result, Task

__all__ = ["Meters", "metrics_so_far"]


class Meters:
    """Sums over the batches of this process; `compute` adds up all processes, so every one of them calls it."""

    def __init__(self, task: Task, prefix: str, device: torch.device) -> None:
        self._task = task
        self._metrics = task.metrics(prefix).to(device)
        self._updates = 0
        for metric in self._metrics.values():
            metric.persistent(True)

    @torch.no_grad()
    def update(self, result: Result, batch: Any) -> None:
        """Count one batch in."""
        self._task.update(self._metrics, result, batch)
        self._updates += 1

    def compute(self) -> dict[str, float]:
        """Every value by its name, NaN where nothing was counted."""
        with warnings.catch_warnings():
            # It counts updates of this process alone: not those before an interruption, nor of the others.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            values = self._metrics.compute()
        return {name: _number(value) for name, value in values.items()}

    @property
    def empty(self) -> bool:
        """Whether nothing was counted here."""
        return self._updates == 0

    def nothing(self) -> dict[str, float]:
        """What `compute` would give if nothing was counted anywhere."""
        return dict.fromkeys((str(name) for name in self._metrics.keys(keep_base=False)), math.nan)

    def state(self) -> dict[str, Any]:
        """The sums of this process."""
        return {"updates": self._updates, "sums": dict(self._metrics.state_dict())}

    def load(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> None:
        """The inverse, given the states of all processes; with another number of them the first takes all sums."""
        if len(states) != world:
            added = _added(states)
            # All must agree on whether anything was counted: `compute` waits for every process.
            states = [added, *({**added, "sums": {}} for _ in range(world - 1))]
        self._updates = int(states[rank]["updates"])
        if states[rank]["sums"]:
            self._metrics.load_state_dict(states[rank]["sums"])


def metrics_so_far(task: Task, state: Mapping[str, Any]) -> dict[str, float]:
    """The training metrics of a running epoch from `Trainer.meters_state`, of this process alone; {} at its start."""
    if not state.get("updates"):
        return {}
    metrics = task.metrics("train_")
    for metric in metrics.values():
        metric.persistent(True)
        metric.distributed_available_fn = _alone  # others do not call this at the same time
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        metrics.load_state_dict(state["sums"])
        return {name: _number(value) for name, value in metrics.compute().items()}


def _alone() -> bool:
    return False


def _number(value: Tensor) -> float:
    """A float32 value with the digits it has: 0.165, not 0.16500000655651093."""
    return float(f"{value.item():.7g}") if value.dtype == torch.float32 else value.item()


def _added(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums: dict[str, Tensor] = {}
    for state in states:
        for name, value in state["sums"].items():
            sums[name] = sums[name] + value if name in sums else value
    return {"updates": sum(state["updates"] for state in states), "sums": sums}
