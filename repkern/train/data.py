"""Batches for the engine, and scikit-learn's digits: 1,797 scanned 8x8 digits that come with the library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

__all__ = ["BatchSource", "DigitsData", "MissingExtraError", "TensorBatches", "load_digits", "random_shift"]

Batch = tuple[torch.Tensor, torch.Tensor]

# The split is part of the task, not of a run: every seed is tested on the same images.
_SPLIT_SEED = 2022
_TEST_PART = 5  # one image in five


class MissingExtraError(ImportError):
    """A library of an optional extra is not installed; the text says how to get it."""


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
    """The digits data set, always split the same way: 1,442 images to train on and 355 to test on.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI), as scikit-learn ships it.
    Raises MissingExtraError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingExtraError(f"the digits need scikit-learn ({error}): pip install 'repkern[quickstart]'") from None
    raw = load()
    images = torch.from_numpy(raw.images).float().div(8).sub(1).unsqueeze(1)  # stored as 0..16
    labels = torch.from_numpy(raw.target).long()
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        members = torch.nonzero(labels == digit).flatten()
        chosen = torch.randperm(len(members), generator=generator)[: len(members) // _TEST_PART]
        is_test[members[chosen]] = True
    return DigitsData(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def random_shift(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Each image of [N, C, H, W] moved by up to `pixels` in both directions; what comes in has the border's value.

    `generator` is a CPU generator, so that a run draws the same shifts on every device.
    """
    if pixels == 0:
        return images
    count, _, height, width = images.shape
    shifts = torch.randint(0, 2 * pixels + 1, (2, count, 1), generator=generator).to(images.device)
    rows = shifts[0] + torch.arange(height, device=images.device)  # [N, H]
    columns = shifts[1] + torch.arange(width, device=images.device)  # [N, W]
    padded = functional.pad(images, (pixels,) * 4, mode="replicate").permute(0, 2, 3, 1)  # [N, H', W', C]
    item = torch.arange(count, device=images.device)[:, None, None]
    return padded[item, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class TensorBatches:
    """Shuffled, shifted batches of tensors that live on the device. The last, smaller batch of an epoch is dropped."""

    def __init__(
        self, data: DigitsData, batch_size: int, *, seed: int, max_shift: int = 0, device: str = "cpu"
    ) -> None:
        if batch_size > len(data.train_labels):
            raise ValueError(f"batch_size must be at most {len(data.train_labels)}, got {batch_size}")
        self._data = DigitsData(*(tensor.to(device) for tensor in data))
        self._batch_size = batch_size
        self._max_shift = max_shift
        self._generator = torch.Generator().manual_seed(seed)
        self.steps_per_epoch = len(data.train_labels) // batch_size

    def train_batches(self) -> Iterator[Batch]:
        """One epoch in a new random order."""
        images, labels = self._data.train_images, self._data.train_labels
        order = torch.randperm(len(labels), generator=self._generator).to(labels.device)
        for step in range(self.steps_per_epoch):
            chosen = order[step * self._batch_size : (step + 1) * self._batch_size]
            yield random_shift(images[chosen], self._max_shift, self._generator), labels[chosen]

    def test_batches(self) -> Iterator[Batch]:
        """All test images as one batch."""
        yield self._data.test_images, self._data.test_labels

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator that orders and shifts."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._generator.set_state(state["generator"])
