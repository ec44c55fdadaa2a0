"""Batches by counter: what the training engine gets its images from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, Literal

from repkern.data.batch import Batch, Shard
from repkern.data.damages import Damages
from repkern.data.draws import epoch_order
from repkern.data.framing import Framing
from repkern.data.huggingface import Row, StreamData, open_row
from repkern.data.images import size_of
from repkern.data.reading import Augment, Mixer, Part, Piece, Read, Reader
from repkern.data.sets import ImageSet, MemoryData
from repkern.data.workers import WorkerPool

__all__ = ["ImageSource"]


class ImageSource:
    """The DataSource over two sets of images: decoded, augmented and normalized in worker processes, or in this one.

    Args:
        train, test: sets of images, such as `MemoryData`.
        batch_size: images of one step, over all processes.
        seed: of order and augmentation.
        framing: cropping and resizing; without it images are used as they are.
        mean, std: of each channel, for pixels in [0, 1]; empty for no normalization.
        augment: from training images [N, C, H, W] floating in [0, 1] and their draws to others, which are then
            normalized in place.
        mix: from normalized training batches and the draws of their samples to mixed ones.
        workers: processes; 0 for this one. The batches are the same to the bit.
        test_batch_size: of this process, at most; 0 for `batch_size`.
        on_error: what happens with an image that cannot be read, see `Damages`; `damaged_share` are allowed.
        options: what else `describe` tells, JSON values.
        name: of the data, for error messages.
    Raises ValueError for sizes and classes that do not fit; fewer training images than a batch are an error too.
    """

    def __init__(
        self,
        train: ImageSet | StreamData,
        test: ImageSet | StreamData,
        *,
        batch_size: int,
        seed: int,
        framing: Framing | None = None,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        augment: Augment | None = None,
        mix: Mixer | None = None,
        workers: int = 0,
        test_batch_size: int = 0,
        on_error: Literal["skip", "fail"] = "skip",
        damaged_share: float = 0.01,
        options: dict[str, Any] | None = None,
        name: str = "",
    ) -> None:
        framing = framing or Framing(channels=train.channels)
        test = test.named_like(train.classes) if isinstance(test, MemoryData) else test
        _check_sets(train, test, framing)
        _check_sizes(len(train), batch_size, test_batch_size, name)
        _check_normalization(mean, std, framing.channels)
        self.classes = train.classes
        self.channels, self.batch_size = framing.channels, batch_size
        self.steps_per_epoch = len(train) // batch_size
        self._train, self._test, self._seed = train, test, seed
        self._test_batch_size = test_batch_size or batch_size
        self._options = {**(options or {}), "seed": seed, "batch_size": batch_size, "size": framing.size}
        self._options |= {"augmented": _name(augment), "mixed": _name(mix)}
        self._description: dict[str, Any] | None = None
        reader = Reader(train, test, seed=seed, framing=framing, mean=mean, std=std, augment=augment, mix=mix)
        self._pool = WorkerPool(reader, workers)
        self._damages = Damages({"train": len(train), "test": len(test)}, on_error, damaged_share)
        self.image_size = framing.size or _own_size(train)

    def train_batches(self, epoch: int, first_step: int = 0, shard: Shard = Shard()) -> Iterator[Batch]:  # noqa: B008
        """`shard.accumulate` batches on the CPU for each step from `first_step` to the end of `epoch` (from 0).

        ValueError when `batch_size` cannot be divided among world * accumulate, and for steps that an epoch lacks.
        DamagedImagesError and DataWorkerError while reading.
        """
        _check_shard(shard, self.batch_size)
        if epoch < 0 or not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(
                f"epoch must be 0 or more and first_step in [0, {self.steps_per_epoch}], got {epoch} and {first_step}"
            )
        count = (self.steps_per_epoch - first_step) * shard.accumulate
        return self._batches("train", self._train_pieces(epoch, first_step, shard), count)

    def test_batches(self, shard: Shard = Shard()) -> Iterator[Batch]:  # noqa: B008
        """The test images of this process, in a fixed order; those of all processes are the whole test set, once.

        Every process has the same number of batches, as long as there are as many images.
        """
        _check_shard(shard._replace(accumulate=1), shard.world)
        spans = self._test_spans(shard)
        return self._batches("test", self._test_pieces(spans), len(spans))

    def describe(self) -> dict[str, Any]:
        """JSON values that a resumed run compares: what would give other batches must differ here."""
        if self._description is None:  # sums of all images, for every checkpoint
            self._description = {**self._options, "train": self._train.describe(), "test": self._test.describe()}
        return self._description

    def damaged(self) -> dict[Part, int]:
        """How many images of each part could not be read so far."""
        return self._damages.counts()

    def close(self) -> None:
        """End the worker processes. They are started again when they are needed."""
        self._pool.close()

    def _batches(self, part: Part, pieces: Iterable[Piece], count: int) -> Iterator[Batch]:
        instead = "others take their places" if part == "train" else "they are left out"
        reads: Iterator[Read] = self._pool.read(pieces, count)
        try:
            for number, read in enumerate(reads, 1):
                self._damages.add(read.damaged)
                self._damages.say(part, instead=instead, more=number == count)
                if len(read.batch.images):
                    yield read.batch
        finally:
            reads.close()  # type: ignore[attr-defined]

    def _train_pieces(self, epoch: int, first_step: int, shard: Shard) -> Iterator[Piece]:
        own = self.batch_size // shard.world
        size = own // shard.accumulate
        order = None if isinstance(self._train, StreamData) else epoch_order(self._seed, epoch, len(self._train))
        rows = None
        if isinstance(self._train, StreamData):
            rows = self._train.rows(first_step * self.batch_size, (self._seed, epoch))
        for step in range(first_step, self.steps_per_epoch):
            block = None if rows is None else _block(rows, self.batch_size, f"step {step}")
            for piece in range(shard.accumulate):
                begin = shard.rank * own + piece * size
                first = step * self.batch_size + begin
                if block is not None:
                    yield Piece("train", epoch, tuple(range(first, first + size)), tuple(block[begin : begin + size]))
                elif order is not None:
                    yield Piece("train", epoch, tuple(order[first : first + size].tolist()))

    def _test_pieces(self, spans: Sequence[tuple[int, int]]) -> Iterator[Piece]:
        rows = self._test.rows(spans[0][0]) if isinstance(self._test, StreamData) and spans else None
        for first, last in spans:
            taken = None if rows is None else tuple(_block(rows, last - first, "the test"))
            yield Piece("test", 0, tuple(range(first, last)), taken)

    def _test_spans(self, shard: Shard) -> list[tuple[int, int]]:
        """The first and the last but one of each batch of a process: equally many batches for everybody."""
        total = len(self._test)
        begin, end = (total * rank // shard.world for rank in (shard.rank, shard.rank + 1))
        most = math.ceil(total / shard.world)  # of any process
        count = math.ceil(most / self._test_batch_size)
        edges = [begin + (end - begin) * at // count for at in range(count + 1)]
        return [(first, last) for first, last in pairwise(edges) if first < last]


def _block(rows: Iterator[Row], count: int, where: str) -> list[Row]:
    block = list(islice(rows, count))
    if len(block) < count:
        raise ValueError(f"the stream ended within {where}: it has fewer rows than it states, or than the limit")
    return block


def _own_size(images: ImageSet | StreamData) -> int:
    """The side of the images as they are, told by the first one that can be read."""
    if isinstance(images, MemoryData):
        height, width = images.images.shape[2:]
        return int(max(height, width))
    problem: Exception | None = None
    rows = iter(images.rows()) if isinstance(images, StreamData) else None
    for number in range(min(10, len(images))):
        try:
            image = open_row(next(rows).image) if rows is not None else images.open(number)  # type: ignore[union-attr]
            with image:
                return max(size_of(image))
        except Exception as error:
            problem = error
    raise ValueError(f"none of the first images can be read: {problem}")


def _check_sets(train: ImageSet | StreamData, test: ImageSet | StreamData, framing: Framing) -> None:
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes)) or ["their order"]
        raise ValueError(
            f"training and test images must have the same classes, they differ in {', '.join(differing[:5])}"
        )
    if train.channels != test.channels:
        raise ValueError(f"training images have {train.channels} channels, test images {test.channels}")
    if len(test) == 0:
        raise ValueError("there are no test images")
    if framing.channels != train.channels and {framing.channels, train.channels} != {1, 3}:
        raise ValueError(f"images of {train.channels} channels cannot become ones of {framing.channels}")


def _check_sizes(count: int, batch_size: int, test_batch_size: int, name: str) -> None:
    if batch_size < 1 or test_batch_size < 0:
        raise ValueError(f"batch_size must be at least 1 and test_batch_size 0, got {batch_size} and {test_batch_size}")
    if count < batch_size:
        of = f" of {name}" if name else ""
        raise ValueError(f"batch_size must be at most the number of training images{of}, {count}, got {batch_size}")


def _check_normalization(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    if len(mean) != len(std) or (mean and len(mean) != channels):
        raise ValueError(f"mean and std must have one value for each of {channels} channels, got {mean} and {std}")
    if any(value <= 0 for value in std):
        raise ValueError(f"std must be above 0, got {std}")


def _check_shard(shard: Shard, batch_size: int) -> None:
    if shard.world < 1 or shard.accumulate < 1 or not 0 <= shard.rank < shard.world:
        raise ValueError(f"rank must be in [0, world), world and accumulate at least 1, got {shard}")
    if batch_size % (shard.world * shard.accumulate):
        raise ValueError(
            f"batch_size {batch_size} cannot be divided among {shard.world} processes in {shard.accumulate} pieces each"
        )


def _name(function: Any) -> str:
    if function is None:
        return ""
    return getattr(function, "__qualname__", type(function).__qualname__)
