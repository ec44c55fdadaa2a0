"""What the training engine asks of data: batches by counter, so that a position is two numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor

__all__ = ["Batch", "DataSource", "Shard"]


class Batch(NamedTuple):
    """images [N, C, H, W] floating; labels [N] int64, or [N, classes] floating where labels are mixed."""

    images: Tensor
    labels: Tensor


class Shard(NamedTuple):
    """Which part of every global batch this process takes: `rank` of `world`, in `accumulate` pieces a step."""

    rank: int = 0
    world: int = 1
    accumulate: int = 1


class DataSource(Protocol):
    """Training and test images. The order is a function of seed and epoch, an augmentation of seed, epoch and sample.

    A source has no state: `train_batches(epoch, first_step)` gives what an uninterrupted run would get from there on,
    with any number of workers. In each step the processes together take the same `batch_size` images in the same order,
    whatever their number: process `rank` takes the contiguous part rank of world of it, in `accumulate` equal pieces.
    """

    classes: tuple[str, ...]
    channels: int
    image_size: int
    batch_size: int
    steps_per_epoch: int

    def train_batches(self, epoch: int, first_step: int = 0, shard: Shard = Shard()) -> Iterator[Batch]:  # noqa: B008
        """`shard.accumulate` batches on the CPU for each step from `first_step` to the end of `epoch` (from 0).

        ValueError when `batch_size` cannot be divided among world * accumulate.
        """

    def test_batches(self, shard: Shard = Shard()) -> Iterator[Batch]:  # noqa: B008
        """The test images of this process, in a fixed order; those of all processes are the whole test set, once."""

    def describe(self) -> dict[str, Any]:
        """JSON values that a resumed run compares: what would give other batches must differ here."""
