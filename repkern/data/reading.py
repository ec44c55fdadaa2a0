"""From numbers of images to a batch: what a worker process does, and this one where there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from repkern.data.batch import Batch
from repkern.data.draws import Draws
from repkern.data.errors import ImageSizeError, MissingExtraError
from repkern.data.framing import Framing
from repkern.data.huggingface import Row, StreamData, open_row
from repkern.data.sets import ImageSet, MemoryData

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Augment", "Damage", "Mixer", "Part", "Piece", "Read", "Reader"]

Augment = Callable[[Tensor, Draws], Tensor]
Mixer = Callable[[Batch, Draws], Batch]
Part = Literal["train", "test"]

_REPLACE_STREAM = 2**32 - 3
_REPLACEMENTS = 16  # tries; with one image in a hundred damaged, the last is not reached in 1e32 images


class Piece(NamedTuple):
    """Which images make a batch, and for streams the rows themselves."""

    part: Part
    epoch: int
    samples: tuple[int, ...]
    rows: tuple[Row, ...] | None = None


class Damage(NamedTuple):
    """An image that is missing or cannot be read."""

    part: Part
    sample: int
    text: str


class Read(NamedTuple):
    """A batch, and what could not be read for it."""

    batch: Batch
    damaged: list[Damage]


class Reader:
    """Reads pieces: 8-bit pixels, in [0, 1], augmented, normalized, mixed. A function of seed and piece.

    A damaged training image is replaced by one that the counter draws, a damaged test image is left out.
    """

    def __init__(
        self,
        train: ImageSet | StreamData,
        test: ImageSet | StreamData,
        *,
        seed: int,
        framing: Framing,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment | None,
        mix: Mixer | None,
    ) -> None:
        self._sets = {"train": train, "test": test}
        self._seed, self._framing, self._augment, self._mix = seed, framing, augment, mix
        self._mean = torch.tensor(list(mean)).reshape(-1, 1, 1)
        self._scale = 1 / torch.tensor(list(std)).reshape(-1, 1, 1)

    def __getitem__(self, piece: Piece) -> Read:
        draws = Draws(self._seed, piece.epoch, torch.tensor(piece.samples, dtype=torch.int64))
        images, labels, damaged = self._raw(piece, draws)
        if piece.part == "train" and self._augment is not None:
            images = self._augment(images, draws)
        if len(self._mean):
            images = images.sub_(self._mean).mul_(self._scale)  # in place: memory is half of what this costs
        batch = Batch(images, labels)
        if piece.part == "train" and self._mix is not None:
            batch = self._mix(batch, draws)
        return Read(batch, damaged)

    def _raw(self, piece: Piece, draws: Draws) -> tuple[Tensor, Tensor, list[Damage]]:
        """Floating images in [0, 1] and labels [N]."""
        images = self._sets[piece.part]
        if piece.rows is not None:
            opened = _OpenedPiece(self, piece, draws, _Rows(piece.rows))
            return opened.read(range(len(piece.rows)))
        assert not isinstance(images, StreamData)  # pieces of streams have rows
        if isinstance(images, MemoryData) and self._framing.keeps(images.images.shape[3], images.images.shape[2]):
            chosen = draws.samples
            return _as_channels(images, chosen, self._framing.channels), images.labels[chosen], []
        return _OpenedPiece(self, piece, draws, images).read(piece.samples)


class _Rows:
    """The rows of a piece of a stream, by their places in it."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self.labels = torch.tensor([row.label for row in rows], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def open(self, number: int) -> Image:
        return open_row(self._rows[number].image)

    def name_of(self, number: int) -> str:
        return str(self._rows[number].image.get("path") or f"row {number} of a batch")


class _OpenedPiece:
    """Reads the images of one piece one by one."""

    def __init__(self, reader: Reader, piece: Piece, draws: Draws, images: ImageSet | _Rows) -> None:
        self._piece, self._draws, self._images, self._framing = piece, draws, images, reader._framing
        crops = piece.part == "train" and self._framing.crop_scale is not None
        self._crops = self._framing.numbers(draws) if crops else [None] * len(draws)
        self._damaged: list[Damage] = []

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, list[Damage]]:
        pixels, labels = [], []
        for place, number in enumerate(numbers):
            found = self._one(place, number)
            if found is not None:
                pixels.append(found[0])
                labels.append(found[1])
        if not pixels:
            side = self._framing.size or 1
            return torch.empty(0, self._framing.channels, side, side), torch.empty(0, dtype=torch.int64), self._damaged
        return _stacked(pixels, numbers, self._images).float().div_(255), self._images.labels[labels], self._damaged

    def _one(self, place: int, number: int) -> tuple[Tensor, int] | None:
        """The pixels and the number of an image, or of one in its place."""
        found = self._pixels(place, number)
        if found is not None or self._piece.part == "test":
            return None if found is None else (found, number)
        tries = self._draws.uniform(_REPLACE_STREAM, _REPLACEMENTS)[place].double() * len(self._images)
        for other in tries.long().tolist():
            found = self._pixels(place, other)
            if found is not None:
                return found, other
        return None

    def _pixels(self, place: int, number: int) -> Tensor | None:
        try:
            with self._images.open(number) as image:
                return self._framing.read(image, self._crops[place])
        except (MissingExtraError, MemoryError):
            raise
        except Exception as problem:  # besides OSError, what each decoder raises about a damaged file
            text = f"{self._images.name_of(number)}: {problem}"
            sample = self._piece.samples[number] if self._piece.rows is not None else number
            self._damaged.append(Damage(self._piece.part, sample, text))
            return None


def _stacked(pixels: list[Tensor], numbers: Sequence[int], images: ImageSet | _Rows) -> Tensor:
    other = next((each for each in pixels if each.shape != pixels[0].shape), None)
    if other is not None:
        (_, height, width), (_, second_height, second_width) = pixels[0].shape, other.shape
        raise ImageSizeError(
            f"images of a batch have different sizes, {width}x{height} and {second_width}x{second_height}"
            f" (near {images.name_of(numbers[0])}): give data.image_size"
        )
    return torch.stack(pixels)


def _as_channels(images: MemoryData, chosen: Tensor, channels: int) -> Tensor:
    pixels = images.images[chosen]
    if pixels.dtype == torch.uint8:
        pixels = pixels.float().div_(images.top)
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1).contiguous()
    red, green, blue = pixels.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)  # ITU-R 601, as Pillow has it
