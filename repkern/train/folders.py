"""Image folders, CIFAR-style: FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png, small enough to stay in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from repkern.data.folders import FileData, load_images, open_folder, read_file
from repkern.data.framing import Framing
from repkern.train.data import Batch, DigitsData, TensorBatches

__all__ = ["FlippedBatches", "load_image_folder", "load_images"]


def load_image_folder(folder: str | Path, size: int = 32) -> DigitsData:
    """Images [N, 3, size, size] float32 in [-1, 1] and labels, from a folder as `repkern.data.open_folder` reads it.

    Of images of another size, the square in the middle is resized. Raises what `open_folder` does, ValueError for files
    that are no images, and MissingExtraError without Pillow.
    """
    train, test = open_folder(folder)
    return DigitsData(_load(train, size), train.labels, _load(test, size), test.labels)


def _load(files: FileData, size: int) -> Tensor:
    pixels = [read_file(files.path(number), Framing(size)) for number in range(len(files))]
    return torch.stack(pixels).float().div_(127.5).sub_(1)


class FlippedBatches(TensorBatches):
    """TensorBatches of photographs: every second image, by chance, is mirrored."""

    def train_batches(self) -> Iterator[Batch]:
        """One epoch in a new random order."""
        for images, labels in super().train_batches():
            mirrored = torch.rand(len(images), generator=self._generator) < 0.5
            yield torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images), labels
