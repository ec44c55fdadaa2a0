"""From a recipe to what it names: data, network and trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repkern.data import DataSource, open_data
from repkern.models import create_model
from repkern.models.digits import DigitsNet
from repkern.models.small_vgg import SmallVGG
from repkern.nn import synchronize_norms
from repkern.train.callbacks import Callback
from repkern.train.distributed import Runtime
from repkern.train.recipe import ModelRecipe, Recipe
from repkern.train.replacing import replaced
from repkern.train.reproducible import seed_everything
from repkern.train.start import start_from
from repkern.train.trackers import trackers
from repkern.train.trainer import Trainer

_logger = logging.getLogger("repkern")

__all__ = ["build_data", "build_model", "build_trainer", "make_network"]


def build_data(recipe: Recipe) -> DataSource:
    """The images of a recipe. Errors as `repkern.data.open_data`."""
    return open_data(recipe.data, batch_size=recipe.train.batch_size, seed=recipe.train.seed)


def build_model(recipe: Recipe, data: DataSource) -> nn.Module:
    """The network of a recipe for the classes and channels of `data`; its initial values depend on the seed alone.

    ValueError for names and patterns that match nothing, and for blocks that cannot replace convolutions.
    """
    wanted = recipe.model
    seed_everything(recipe.train.seed)
    model = make_network(wanted, classes=len(data.classes), channels=data.channels)
    if wanted.checkpoint:
        left = start_from(model, wanted.checkpoint)
        if left:
            _logger.info("%s: other classes, so %s start anew", wanted.checkpoint, " and ".join(left))
    if wanted.replace is not None:
        model = replaced(model, wanted.replace)
    if wanted.freeze:
        _freeze(model, wanted.freeze)
    if wanted.sync_norm:
        synchronize_norms(model)
    return model.to(getattr(torch, wanted.dtype))


def make_network(wanted: ModelRecipe, *, classes: int, channels: int) -> nn.Module:
    """The network that a recipe names, before anything in it is replaced."""
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels, **wanted.options}
    if wanted.name == "digits_net":
        if wanted.block is not None:
            raise ValueError(
                f"digits_net is made of plain convolutions (see model.replace), got block {wanted.block!r}"
            )
        return DigitsNet(**options)
    if wanted.name == "small_vgg":
        return SmallVGG(block=wanted.block or "conv_bn", **options)
    return create_model(wanted.name, block=wanted.block, **options)


def _freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise ValueError(f"model.freeze: {idle[0]!r} matches no parameter; there are {', '.join(names[:6])}, ...")
    for name, parameter in model.named_parameters():
        if _matches(name, patterns):
            parameter.requires_grad_(False)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def build_trainer(
    recipe: Recipe,
    data: DataSource,
    *,
    folder: Path | None = None,
    callbacks: Sequence[Callback] = (),
    runtime: Runtime | None = None,
) -> Trainer:
    """Everything a training needs, at its first step."""
    model = build_model(recipe, data)
    logs = trackers(recipe.log, folder)
    return Trainer(model, data, recipe, callbacks=[*callbacks, *logs], folder=folder, runtime=runtime)
