"""Fashion-MNIST, and the IDX files that MNIST-like data sets come in."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from repkern.data.fetch import cache_folder, download
from repkern.data.sets import MemoryData

__all__ = ["FASHION_CLASSES", "open_fashion_mnist", "read_idx"]

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# MD5 of the .gz files, as the authors state them.
_SUMS = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
_UNSIGNED_BYTES = 8


def open_fashion_mnist(root: str | Path = "", *, fetch: bool = False) -> tuple[MemoryData, MemoryData]:
    """Fashion-MNIST (1708.07747): 60,000 grey images [N, 1, 28, 28] to train on and 10,000 to test on.

    The four IDX files, compressed or not, are looked for in `root`; without it in the place of Debian's package
    dataset-fashion-mnist and in the cache folder. With `fetch` they are downloaded when they are not there.
    FileNotFoundError names where it looked; ValueError for damaged files.
    """
    folders = [Path(root)] if root else [_DEBIAN, cache_folder("fashion-mnist")]
    found = [_locate(folders, name) for name in _SUMS]
    if None in found and fetch:
        for name, known in _SUMS.items():
            if _locate(folders[-1:], name) is None:
                download(f"{_URL}{name}.gz", folders[-1] / f"{name}.gz", "md5", known)
        found = [_locate(folders[-1:], name) for name in _SUMS]
    missing = [name for name, path in zip(_SUMS, found, strict=True) if path is None]
    if missing:
        raise FileNotFoundError(
            f"Fashion-MNIST: {', '.join(missing)} (.gz) not found in {' or '.join(map(str, folders))}; "
            "name the folder (data.root), install dataset-fashion-mnist (Debian), or allow the download (data.download)"
        )
    train_images, train_labels, test_images, test_labels = (path for path in found if path is not None)
    return _pair(train_images, train_labels), _pair(test_images, test_labels)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes [...] uint8 of an IDX file, compressed when it ends in .gz. ValueError when it is not whole."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise ValueError(f"{path} is damaged: {problem}") from None
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, _UNSIGNED_BYTES, dimensions)):
        raise ValueError(f"{path} is no IDX file of bytes in {dimensions} dimensions, it starts with {data[:4].hex()}")
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{path} should have {math.prod(shape)} values for its shape {shape}, got {len(data) - start}")
    return torch.from_numpy(numpy.frombuffer(data, dtype=numpy.uint8, offset=start).copy()).reshape(shape)


def _locate(folders: Sequence[Path], name: str) -> Path | None:
    names = (name, f"{name}.gz")
    return next((folder / each for folder in folders for each in names if (folder / each).is_file()), None)


def _pair(images: Path, labels: Path) -> MemoryData:
    try:
        return MemoryData(read_idx(images, 3).unsqueeze(1), read_idx(labels, 1), FASHION_CLASSES)
    except ValueError as problem:
        raise ValueError(f"{images.parent}: {problem}") from None
