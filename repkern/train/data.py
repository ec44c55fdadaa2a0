"""Batches for the engine, and scikit-learn's digits: 1,797 scanned 8x8 digits that come with the library."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

from repkern.data.digits import open_digits
from repkern.data.errors import MissingExtraError

__all__ = ["BatchSource", "DigitsData", "MissingExtraError", "TensorBatches", "load_digits", "random_affine"]

Batch = tuple[torch.Tensor, torch.Tensor]


class BatchSource(Protocol):
    """What the engine trains on. `state_dict` holds all that the order and augmentation of later epochs depend on."""

    steps_per_epoch: int

    def train_batches(self) -> Iterator[Batch]:
        """One epoch of (inputs, labels) on the training device."""

    def test_batches(self) -> Iterator[Batch]:
        """The test set, in a fixed order."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the source that made `state` would have."""


class DigitsData(NamedTuple):
    """Images [N, 1, 8, 8] float32 in [-1, 1] and labels [N] int64, split with every class in proportion."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_digits() -> DigitsData:
    """The digits of `repkern.data.open_digits` as tensors. Raises MissingExtraError without scikit-learn."""
    train, test = open_digits()
    first, second = (part.images.float().div(part.top / 2).sub(1) for part in (train, test))
    return DigitsData(first, train.labels, second, test.labels)


def random_affine(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Each image of [N, C, H, W] turned, scaled and moved a little; what comes in has the border's value.

    At strength 1 by up to 10 degrees, 10 % and one pixel of eight. `generator` is a CPU generator, so that a run draws
    the same on every device. ValueError for a negative strength.
    """
    if strength < 0:
        raise ValueError(f"strength must be zero or more, got {strength}")
    if strength == 0:
        return images
    angle, scale, right, down = strength * (2 * torch.rand(4, len(images), generator=generator) - 1)
    angle, scale = math.radians(10) * angle, 1 + 0.1 * scale
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), right / 4], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), down / 4], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    grid = grid.to(images.device, images.dtype)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


class TensorBatches:
    """Shuffled, augmented batches of tensors that live on the device. The smaller batch at the end is dropped."""

    def __init__(
        self, data: DigitsData, batch_size: int, *, seed: int, augment: float = 0.0, device: str = "cpu"
    ) -> None:
        if batch_size > len(data.train_labels):
            raise ValueError(f"batch_size must be at most {len(data.train_labels)}, got {batch_size}")
        self._data = DigitsData(*(tensor.to(device) for tensor in data))
        self._batch_size = batch_size
        self._augment = augment
        self._generator = torch.Generator().manual_seed(seed)
        self.steps_per_epoch = len(data.train_labels) // batch_size

    def train_batches(self) -> Iterator[Batch]:
        """One epoch in a new random order."""
        images, labels = self._data.train_images, self._data.train_labels
        order = torch.randperm(len(labels), generator=self._generator).to(labels.device)
        for step in range(self.steps_per_epoch):
            chosen = order[step * self._batch_size : (step + 1) * self._batch_size]
            yield random_affine(images[chosen], self._augment, self._generator), labels[chosen]

    def test_batches(self) -> Iterator[Batch]:
        """All test images as one batch."""
        yield self._data.test_images, self._data.test_labels

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator that orders and augments."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._generator.set_state(state["generator"])
