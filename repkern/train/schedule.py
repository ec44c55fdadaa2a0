"""Learning rates over the steps of a training: each a function of the step alone, so that a position says it all."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

import torch

from repkern.train.recipe import ScheduleRecipe

__all__ = ["Schedule", "learning_rate_factor"]

# torch's OneCycleLR: how much of the time the rate rises, and by how much it starts and ends below the peak.
_ONECYCLE = (0.3, 1 / 25, 1 / 250_000)


class Schedule:
    """Sets the learning rate of every group to its peak ("initial_lr") times the factor of the step.

    Not a torch LRScheduler: those count their own calls, and a position, a skipped step or a group that joined later
    would each need to be told to them.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, recipe: ScheduleRecipe, *, steps: int, steps_per_epoch: int
    ) -> None:
        self._optimizer = optimizer
        self._factor = learning_rate_factor(recipe, steps=steps, steps_per_epoch=steps_per_epoch)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def set(self, step: int) -> None:
        """For the step after `step` steps."""
        factor = self._factor(step)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def rate(self, step: int) -> float:
        """The learning rate of the first group after `step` steps."""
        return self._optimizer.param_groups[0]["initial_lr"] * self._factor(step)


def learning_rate_factor(recipe: ScheduleRecipe, *, steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """step -> factor on the peak learning rate. A warm-up is at most half of the steps.

    cosine, poly, linear: from 1 after the warm-up to `final` at the end. step: times `gamma` at each milestone.
    constant: 1. onecycle: up and down along cosines, as torch's OneCycleLR; it has its own warm-up.
    """
    if steps < 1 or steps_per_epoch < 1:
        raise ValueError(f"steps and steps_per_epoch must be at least 1, got {steps} and {steps_per_epoch}")
    if recipe.name == "onecycle":
        return lambda step: _onecycle(min(step, steps - 1), steps)
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), steps // 2)
    milestones = sorted(round(epoch * steps_per_epoch) for epoch in recipe.milestones)

    def factor(step: int) -> float:
        if step < warmup:
            return recipe.warmup_start + (1 - recipe.warmup_start) * step / warmup
        if recipe.name == "constant":
            return 1.0
        if recipe.name == "step":
            return recipe.gamma ** bisect_right(milestones, step)
        done = min((step - warmup) / (steps - warmup), 1.0)
        return recipe.final + (1 - recipe.final) * _falling(recipe, done)

    return factor


def _falling(recipe: ScheduleRecipe, done: float) -> float:
    if recipe.name == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return (1 - done) ** (recipe.power if recipe.name == "poly" else 1.0)


def _onecycle(step: int, steps: int) -> float:
    rising, first, last = _ONECYCLE
    top = rising * steps - 1
    start, end, begin, length = (first, 1.0, 0.0, top) if step <= top else (1.0, last, top, steps - 1 - top)
    part = (step - begin) / length if length > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2
