"""CIFAR-10 and CIFAR-100 from their binary archives. The Python archives are pickles, which can run anything."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from repkern.data.fetch import cache_folder, download, first_with
from repkern.data.sets import MemoryData

__all__ = ["open_cifar"]

_URL = "https://www.cs.toronto.edu/~kriz/"
_PIXELS = 3 * 32 * 32


class _Kind(NamedTuple):
    name: str
    archive: str
    md5: str  # as the authors state it
    folder: str
    train: Sequence[str]
    test: str
    names: str
    label_bytes: int  # of an image; the last one is the class
    classes: int


_KINDS = {
    10: _Kind(
        "CIFAR-10",
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-batches-bin",
        [f"data_batch_{part}.bin" for part in range(1, 6)],
        "test_batch.bin",
        "batches.meta.txt",
        1,
        10,
    ),
    100: _Kind(
        "CIFAR-100",
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-binary",
        ["train.bin"],
        "test.bin",
        "fine_label_names.txt",
        2,
        100,
    ),
}


def open_cifar(classes: int, root: str | Path = "", *, fetch: bool = False) -> tuple[MemoryData, MemoryData]:
    """CIFAR-10 or CIFAR-100 (its fine labels): 50,000 images [N, 3, 32, 32] to train on and 10,000 to test on.

    `root` is the archive, its unpacked folder, or a folder with one of them; without it the cache folder is looked in.
    With `fetch` the archive is downloaded when it is not there. FileNotFoundError names where it looked; ValueError for
    damaged files.
    """
    kind = _KINDS[classes]
    folder = Path(root) if root else cache_folder(kind.folder)
    source = _locate(kind, folder)
    if source is None and fetch:
        source = download(_URL + kind.archive, folder / kind.archive, "md5", kind.md5)
    if source is None:
        raise FileNotFoundError(_not_there(kind, folder))
    files = _read_folder(kind, source) if source.is_dir() else _read_archive(kind, source)
    names = files[kind.names].decode("utf-8", "replace").split()
    if len(names) != kind.classes:
        raise ValueError(f"{source}: {kind.names} should name {kind.classes} classes, got {len(names)}")
    train = b"".join(_whole(kind, source, name, files[name]) for name in kind.train)
    return _set(kind, names, source, train), _set(
        kind, names, source, _whole(kind, source, kind.test, files[kind.test])
    )


def _locate(kind: _Kind, path: Path) -> Path | None:
    if path.is_file() or (path / kind.test).is_file():
        return path
    return first_with([path], [kind.folder, kind.archive])


def _not_there(kind: _Kind, folder: Path) -> str:
    names = [name.replace("binary", "python").replace("-bin", "-py") for name in (kind.archive, kind.folder)]
    pickles = first_with([folder], names)
    if pickles is not None:
        return f"{pickles} holds pickles, which are not read; {kind.name} is read from {kind.archive}"
    return (
        f"{kind.name}: neither {kind.archive} nor {kind.folder} found in {folder}; "
        f"name its place (data.root), or allow the download from {_URL} (data.download)"
    )


def _needed(kind: _Kind) -> list[str]:
    return [*kind.train, kind.test, kind.names]


def _read_folder(kind: _Kind, folder: Path) -> dict[str, bytes]:
    missing = [name for name in _needed(kind) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} should hold {kind.name}, but lacks {', '.join(missing)}")
    return {name: (folder / name).read_bytes() for name in _needed(kind)}


def _read_archive(kind: _Kind, path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:  # in their order: looking for one by name unpacks all of it
                name = Path(member.name).name
                if member.isfile() and name in _needed(kind):
                    content = archive.extractfile(member)
                    assert content is not None  # a file has content
                    files[name] = content.read()
    except (tarfile.TarError, EOFError, zlib.error) as problem:
        raise ValueError(f"{path} is damaged, or no archive: {problem}") from None
    missing = [name for name in _needed(kind) if name not in files]
    if missing:
        raise ValueError(f"{path} should hold {kind.name} in binary form, but lacks {', '.join(missing)}")
    return files


def _whole(kind: _Kind, source: Path, name: str, data: bytes) -> bytes:
    record = kind.label_bytes + _PIXELS
    if not data or len(data) % record:
        raise ValueError(f"{source}: {name} should be records of {record} bytes, got {len(data)} bytes")
    return data


def _set(kind: _Kind, names: Sequence[str], source: Path, data: bytes) -> MemoryData:
    records = numpy.frombuffer(data, dtype=numpy.uint8).reshape(-1, kind.label_bytes + _PIXELS)
    images = torch.from_numpy(records[:, kind.label_bytes :].copy()).reshape(-1, 3, 32, 32)
    try:
        return MemoryData(images, torch.from_numpy(records[:, kind.label_bytes - 1].copy()), names)
    except ValueError as problem:
        raise ValueError(f"{source}: {problem}") from None
