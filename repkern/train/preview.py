"""What a recipe will train and what that takes, before anything is trained: `repkern train --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from repkern.train.build import build_data, build_model
from repkern.train.optimizers import make_optimizer
from repkern.train.profile import LayerProfile, MemoryEstimate, estimate_memory, profile_layers
from repkern.train.recipe import Recipe

__all__ = ["KNOWN_DATA", "DataOutline", "Preview", "outline_of", "preview"]

#: Classes, channels and side of data sets that need not be there to be known; 0: images have no size of their own.
KNOWN_DATA = {
    "digits": (10, 1, 8),
    "fashion_mnist": (10, 1, 28),
    "cifar10": (10, 3, 32),
    "cifar100": (100, 3, 32),
    "imagenet": (1000, 3, 0),
}


@dataclass(frozen=True)
class DataOutline:
    """What a network has to know about images."""

    classes: Sequence[str]
    channels: int
    image_size: int


@dataclass(frozen=True)
class Preview:
    """The whole recipe, the network's layers, and the memory of one process."""

    recipe: Recipe
    data: DataOutline
    layers: Sequence[LayerProfile]
    memory: MemoryEstimate
    trained: int
    images: int

    @property
    def parameters(self) -> int:
        """Numbers in the network, frozen ones included."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        """Of the training form's forward pass, for one image."""
        return sum(layer.multiply_adds for layer in self.layers)

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "classes": len(self.data.classes),
            "image": [self.data.channels, self.data.image_size, self.data.image_size],
            "images_per_process": self.images,
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "multiply_adds": self.multiply_adds,
            "memory": self.memory.as_json(),
            "layers": [asdict(layer) for layer in self.layers],
        }


def outline_of(recipe: Recipe) -> DataOutline:
    """Classes, channels and size of a recipe's images; data that is not known by its name, or is there, is opened.

    Errors as `repkern.data.open_data`.
    """
    data = recipe.data
    classes, channels, size = KNOWN_DATA.get(data.name, (data.classes, 3, 0))
    known = classes > 0 and (data.image_size or size) > 0
    if known and not (data.root and Path(data.root).exists()):
        names = tuple(str(number) for number in range(classes))
        return DataOutline(names, data.channels or channels, data.image_size or size)
    opened = build_data(recipe)
    return DataOutline(tuple(opened.classes), opened.channels, opened.image_size)


def preview(recipe: Recipe, data: DataOutline, *, processes: int = 1) -> Preview:
    """The network of a recipe for such images, and the memory that one of `processes` takes in training.

    ValueError for what cannot be built, and for a batch that cannot be divided.
    """
    model = build_model(recipe, cast(Any, data))
    shape = (data.channels, data.image_size, data.image_size)
    settings = recipe.train
    images, rest = divmod(settings.batch_size, processes)
    if rest or images % settings.accumulate:
        raise ValueError(
            f"train.batch_size {settings.batch_size} cannot be divided among {processes} processes of "
            f"{settings.accumulate} pieces"
        )
    memory = estimate_memory(
        model, shape, images, _optimizer_of(recipe), accumulate=settings.accumulate, ema=recipe.ema is not None
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Preview(recipe, data, profile_layers(model, shape), memory, trained, images)


def _optimizer_of(recipe: Recipe) -> Any:
    """Makes the recipe's optimizer, or for a RepOptimizer one with as much state: its multipliers are vectors."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        plain = recipe.optimizer.model_copy(update={"name": recipe.optimizer.name.removeprefix("rep")})
        return make_optimizer(model, recipe.model_copy(update={"optimizer": plain}))

    return make
