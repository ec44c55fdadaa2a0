"""Image folders: FOLDER/train/CLASS/* and FOLDER/test/CLASS/* (or val, validation), as ImageNet is laid out too."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from repkern.data.errors import MissingExtraError
from repkern.data.framing import Framing
from repkern.data.images import SUFFIXES, open_image
from repkern.data.sets import digest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TEST_NAMES", "FileData", "load_images", "open_folder", "read_file"]

TEST_NAMES = ("test", "val", "validation")


class FileData:
    """Images as files below a folder, given by their paths relative to it.

    ValueError when there are no images, and when the labels [N] int64 do not fit.
    """

    channels = 3

    def __init__(self, folder: str | Path, files: Sequence[bytes], labels: Tensor, classes: Sequence[str]) -> None:
        if len(files) == 0:
            raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)})")
        if labels.shape != (len(files),):
            raise ValueError(f"labels must be [{len(files)}], one a file, got {list(labels.shape)}")
        self.folder, self.labels, self.classes = Path(folder), labels, tuple(classes)
        # One array: lists of a million strings are copied in every worker as soon as somebody looks at them.
        self._files = numpy.asarray(files, dtype=numpy.bytes_)

    def __len__(self) -> int:
        return len(self._files)

    def open(self, number: int) -> Image:
        """The file, its pixels not read yet."""
        return open_image(self.path(number))

    def path(self, number: int) -> Path:
        """The path of an image."""
        return self.folder / os.fsdecode(bytes(self._files[number]))

    def name_of(self, number: int) -> str:
        """Its path."""
        return str(self.path(number))

    def take(self, numbers: Tensor) -> FileData:
        """The set of the images with these numbers [M] int64, in their order."""
        return FileData(self.folder, self._files[numbers.numpy()], self.labels[numbers], self.classes)

    def describe(self) -> dict[str, Any]:
        """A sum of names and labels; the folder may be elsewhere."""
        return {
            "images": len(self),
            "classes": list(self.classes),
            "sum": digest(self._files.tobytes(), self.labels.numpy().tobytes()),
        }


def open_folder(folder: str | Path) -> tuple[FileData, FileData]:
    """The images to train on and those to test on. Classes are the names of the folders in `train`, sorted.

    Files of other kinds and hidden ones are left out. FileNotFoundError for a folder without `train` and one of `test`,
    `val` and `validation`; ValueError for classes that differ between the two, fewer than two, or without an image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    tests = [folder / name for name in TEST_NAMES if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not tests:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(
            f"{folder} needs the folders train and test (or val) of a folder for each class; it has {inside}"
        )
    classes = _classes(folder / "train")
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'} needs a folder for each of at least two classes, got {len(classes)}")
    if _classes(tests[0]) != classes:
        differing = sorted(set(classes) ^ set(_classes(tests[0])))
        raise ValueError(
            f"{folder / 'train'} and {tests[0]} must have the same classes, they differ in {_few(differing)}"
        )
    return _scan(folder / "train", classes), _scan(tests[0], classes)


def load_images(folder: str | Path, count: int, size: int, channels: int = 3) -> Tensor:
    """At most `count` images below `folder`, at equal distances in the order of their paths: [N, channels, size, size].

    float32 in [0, 1]; 1 channel: grey. Of each image, the square in its middle. ValueError for a folder without images,
    for files that are none, and for other numbers of channels; MissingExtraError without Pillow.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, the network takes {channels}")
    files = list(_walk(Path(folder)))
    if not files:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)})")
    chosen = [files[at * len(files) // count] for at in range(count)] if count < len(files) else files
    framing = Framing(size, channels)
    return torch.stack([read_file(Path(folder) / os.fsdecode(path), framing) for path in chosen]).float().div_(255)


def read_file(path: Path, framing: Framing) -> Tensor:
    """The pixels [C, H, W] uint8 of a file. ValueError, which names it, when it is not a readable image."""
    try:
        with open_image(path) as image:
            return framing.read(image)
    except MissingExtraError:
        raise
    except Exception as problem:  # besides OSError, what each decoder raises about a damaged file
        raise ValueError(f"{path} is no readable image: {problem}") from None


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _scan(folder: Path, classes: list[str]) -> FileData:
    files: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = [os.fsencode(name) + b"/" + path for path in _walk(folder / name)]
        if not found:
            raise ValueError(f"{folder / name} has no images ({', '.join(SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    return FileData(folder, files, torch.tensor(labels), classes)


def _walk(folder: Path) -> Iterator[bytes]:
    """The images below a folder, relative to it, in the order of their paths; links are followed, no circles."""
    suffixes = tuple(suffix.encode() for suffix in SUFFIXES)
    top = os.fsencode(folder)
    above: dict[bytes, tuple[bytes, ...]] = {top: (os.path.realpath(top),)}
    found = []
    for place, folders, names in os.walk(top, followlinks=True):
        start = os.path.relpath(place, top).replace(os.fsencode(os.sep), b"/")
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith(b"."):
                found.append(name if start == b"." else start + b"/" + name)
        chain = above.pop(place)
        real = {name: os.path.realpath(os.path.join(place, name)) for name in folders}
        folders[:] = [name for name in folders if not name.startswith(b".") and real[name] not in chain]
        above |= {os.path.join(place, name): (*chain, real[name]) for name in folders}
    return iter(sorted(found))
