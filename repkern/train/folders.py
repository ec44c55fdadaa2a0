"""Image folders, CIFAR-style: FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png, small enough to stay in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from repkern.train.data import Batch, DigitsData, MissingExtraError, TensorBatches

__all__ = ["FlippedBatches", "load_image_folder", "load_images"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_TEST_NAMES = ("test", "val", "validation")


def load_image_folder(folder: str | Path, size: int = 32) -> DigitsData:
    """Images [N, 3, size, size] float32 in [-1, 1] and labels by the sorted names of the training classes.

    Images of another size are resized (bilinear, antialiased). FileNotFoundError for a folder without `train` and
    `test` (or `val`); ValueError for classes that differ between the two, fewer than two, or without an image, and for
    files that are no images; MissingExtraError without Pillow.
    """
    folder = Path(folder)
    tests = [folder / name for name in _TEST_NAMES if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not tests:
        raise FileNotFoundError(f"{folder} needs the folders train and test, with a folder of images for each class")
    classes = _classes(folder / "train")
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'} needs a folder for each of at least two classes, got {len(classes)}")
    if _classes(tests[0]) != classes:
        differing = sorted(set(classes) ^ set(_classes(tests[0])))
        raise ValueError(f"{folder / 'train'} and {tests[0]} must have the same classes, they differ in {differing}")
    return DigitsData(*_load(folder / "train", classes, size), *_load(tests[0], classes, size))


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _load(folder: Path, classes: list[str], size: int) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in _SUFFIXES)
        if not files:
            raise ValueError(f"{folder / name} has no images ({', '.join(_SUFFIXES)})")
        images += [_read(path, size) for path in files]
        labels += [label] * len(files)
    return torch.stack(images).float().div_(127.5).sub_(1), torch.tensor(labels)


def load_images(folder: str | Path, count: int, size: int, channels: int = 3) -> Tensor:
    """At most `count` images below `folder`, at equal distances in the order of their paths: [N, channels, size, size].

    float32 in [0, 1]; 1 channel: grey. ValueError for a folder without images and files that are none, and for other
    numbers of channels; MissingExtraError without Pillow.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, the network takes {channels}")
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{folder} has no images ({', '.join(_SUFFIXES)})")
    chosen = [files[at * len(files) // count] for at in range(count)] if count < len(files) else files
    pixels = torch.stack([_read(path, size) for path in chosen]).float().div_(255)
    return pixels if channels == 3 else pixels.mean(dim=1, keepdim=True)


def _read(path: Path, size: int) -> Tensor:
    """[3, size, size] uint8."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("image folders need Pillow: pip install 'repkern[quickstart]'") from None
    import numpy

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as problem:  # besides OSError, what each decoder raises about a damaged file
        raise ValueError(f"{path} is no readable image: {problem}") from None
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1)


class FlippedBatches(TensorBatches):
    """TensorBatches of photographs: every second image, by chance, is mirrored."""

    def train_batches(self) -> Iterator[Batch]:
        """One epoch in a new random order."""
        for images, labels in super().train_batches():
            mirrored = torch.rand(len(images), generator=self._generator) < 0.5
            yield torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images), labels
