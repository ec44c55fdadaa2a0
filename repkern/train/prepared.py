"""What a network becomes before its first step: the same in every process, averaged, sharded, with optimizers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from repkern.train import sharded
from repkern.train.distributed import Runtime
from repkern.train.ema import MovingAverage
from repkern.train.optimizers import make_optimizer
from repkern.train.recipe import TrainingRecipe

__all__ = ["prepared"]


def prepared(
    model: nn.Module,
    recipe: TrainingRecipe,
    runtime: Runtime,
    optimizers: Mapping[str, torch.optim.Optimizer] | None,
) -> tuple[dict[str, torch.optim.Optimizer], MovingAverage | None]:
    """Optimizers by name and the moving average, if the recipe has one. `optimizers`: None for that of the recipe.

    From here on each process has random numbers of its own. ValueError for what the recipe's strategy cannot do, and
    for a runtime that was made for something else.
    """
    runtime.check(recipe.train)
    runtime.share_weights(model)
    average = None if recipe.ema is None else MovingAverage(model, recipe.ema)
    if runtime.shards:
        # Sharded networks cannot be copied, and their parameters are other objects than before.
        sharded.check_recipe(recipe, optimizers)
        runtime.shard(model, *([] if average is None else [average.module]))
    made = dict(optimizers or {"weights": make_optimizer(model, recipe)})
    if average is not None:
        average.restart(model)  # optimizers of RepOpt give the network its first kernels
    runtime.vary_random()
    return made, average
