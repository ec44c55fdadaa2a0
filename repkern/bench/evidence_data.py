"""The images of the evidence table, in memory."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from safetensors import safe_open

from repkern.bench.evidence import Setting
from repkern.data.idx import open_fashion_mnist
from repkern.data.sets import MemoryData
from repkern.data.source import ImageSource

__all__ = ["EvidenceData", "open_data"]

_TEST_BATCH = 500


def open_data(setting: Setting, path: Path | None) -> EvidenceData:
    """The images of `setting`. path: the folder of Fashion-MNIST, None for its usual places; a file of JPEG images.

    Errors as `open_fashion_mnist`, and FileNotFoundError and ValueError for the file of JPEG images.
    """
    if setting.data == "fashion_mnist":
        train, test = open_fashion_mnist(path or "")
    else:
        if path is None or not path.is_file():
            raise FileNotFoundError(f"{setting.name} needs a file of JPEG images (--data FILE.safetensors), got {path}")
        train, test = (_read_jpegs(path, part, setting.images if part == "train" else None) for part in _PARTS)
    return EvidenceData.of(train, test, setting.images)


_PARTS = ("train", "test")


def _read_jpegs(path: Path, part: str, most: int | None) -> MemoryData:
    """The first `most` images of `{part}_jpeg`, uint8, one behind the other, by `{part}_offsets`, `{part}_labels`."""
    from PIL import Image

    with safe_open(str(path), "pt") as file:
        missing = {f"{part}_{name}" for name in ("jpeg", "offsets", "labels")} - set(file.keys())
        if missing:
            raise ValueError(f"{path} has no tensor {min(missing)}: it is no file of JPEG images")
        offsets, labels = file.get_tensor(f"{part}_offsets").tolist(), file.get_tensor(f"{part}_labels")
        stored = file.get_tensor(f"{part}_jpeg").numpy().tobytes()
    spans = list(itertools.pairwise(offsets))[:most]
    pixels = [numpy.asarray(Image.open(io.BytesIO(stored[begin:end])).convert("RGB")) for begin, end in spans]
    images = torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2)
    return MemoryData(images, labels[: len(spans)], [str(number) for number in range(int(labels.max()) + 1)])


@dataclass(frozen=True)
class EvidenceData:
    """The first training images and all test images, with the mean and the deviation of each channel of the former."""

    train: MemoryData
    test: MemoryData
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, train: MemoryData, test: MemoryData, images: int) -> EvidenceData:
        """With `images` training images. ValueError when there are not so many."""
        if not 0 < images <= len(train):
            raise ValueError(f"images must be from 1 to {len(train)}, those in the training set, got {images}")
        taken = train.take(torch.arange(images))
        pixels = taken.images.double() / 255
        mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
        return cls(taken, test, tuple(mean.tolist()), tuple(std.tolist()))

    def source(self, seed: int, batch_size: int) -> ImageSource:
        """Batches in the order of `seed`, without augmentation: all arms of a seed see the same. Errors as it has."""
        return ImageSource(
            self.train, self.test, batch_size=batch_size, seed=seed, mean=self.mean, std=self.std,
            test_batch_size=_TEST_BATCH,
        )  # fmt: skip
