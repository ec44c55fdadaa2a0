"""Data sets in Hugging Face's layouts, through `datasets`: a local folder, parquet files, or a name on the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from repkern.data.errors import MissingExtraError
from repkern.data.images import open_image
from repkern.data.sets import digest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Row", "RowData", "StreamData", "open_huggingface", "open_row"]

_TEST_SPLITS = ("test", "validation", "val", "valid")


class Row(NamedTuple):
    """An image as `datasets` stores it (its bytes, or the path of its file), and its label."""

    image: dict[str, Any]
    label: int


class _Columns(NamedTuple):
    image: str
    label: str
    classes: tuple[str, ...] | None  # None: numbers that have no names


class RowData:
    """A data set that `datasets` has on disk, read by number."""

    channels = 3

    def __init__(self, rows: Any, columns: _Columns, where: str, labels: Tensor) -> None:
        self._rows, self._columns, self._where = rows, columns, where
        self.labels = labels
        names = range(int(labels.max()) + 1) if columns.classes is None else columns.classes
        self.classes = tuple(map(str, names))
        if int(labels.min()) < 0 or int(labels.max()) >= len(self.classes):
            raise ValueError(
                f"{where}: labels must be in [0, {len(self.classes)}), got {int(labels.min())} to {int(labels.max())}"
                " (-1 stands for hidden labels: choose another split)"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def open(self, number: int) -> Image:
        """The image of a row, its pixels not read yet."""
        return open_row(self._rows[number][self._columns.image])

    def name_of(self, number: int) -> str:
        """Its place in the split."""
        return f"row {number} of {self._where}"

    def take(self, numbers: Tensor) -> RowData:
        """The set of the images with these numbers [M] int64, in their order."""
        columns = self._columns._replace(classes=self.classes)
        return RowData(self._rows.select(numbers.tolist()), columns, self._where, self.labels[numbers])

    def describe(self) -> dict[str, Any]:
        """A sum of the labels: `datasets` promises no sum of images."""
        return {"images": len(self), "classes": list(self.classes), "sum": digest(self.labels.numpy().tobytes())}


class StreamData:
    """A data set that is read from its start each time, not by number; `shuffle` is the size of the shuffling buffer.

    The order of an epoch is that of `datasets`: shards and a buffer, shuffled by seed and epoch. To start in its
    middle, the rows before are read and left out.
    """

    channels = 3

    def __init__(self, rows: Any, columns: _Columns, where: str, length: int, shuffle: int) -> None:
        if columns.classes is None:
            raise ValueError(f"{where}: streaming needs a label column with class names (ClassLabel)")
        self._rows, self._columns, self._where = rows, columns, where
        self._length, self._shuffle = length, shuffle
        self.classes = columns.classes

    def __len__(self) -> int:
        return self._length

    @property
    def where(self) -> str:
        """Which split of what, for messages."""
        return self._where

    def rows(self, start: int = 0, shuffled: tuple[int, int] | None = None) -> Iterator[Row]:
        """The rows from `start` on, in the order of (seed, epoch) or in their own."""
        rows = self._rows
        if shuffled is not None:
            rows = rows.shuffle(seed=shuffled[0], buffer_size=self._shuffle)
        rows = rows.skip(start)
        if shuffled is not None:
            rows.set_epoch(shuffled[1])  # last: what is made of a data set begins with epoch 0
        for row in islice(rows, self._length - start):
            yield Row(row[self._columns.image], int(row[self._columns.label]))

    def describe(self) -> dict[str, Any]:
        """What decides the order."""
        return {"images": len(self), "classes": list(self.classes), "shuffle": self._shuffle}


def open_huggingface(
    name: str,
    *,
    config: str = "",
    train_split: str = "train",
    test_split: str = "",
    image_column: str = "",
    label_column: str = "",
    streaming: bool = False,
    shuffle: int = 10_000,
    lengths: tuple[int, int] = (0, 0),
) -> tuple[RowData, RowData] | tuple[StreamData, StreamData]:
    """The training and test images of a data set. Columns are found by their kind when they are not named.

    `lengths` are the numbers of rows used of a stream; 0 for all, which the data set must then state. MissingExtraError
    without `datasets`; OSError when the data set is not there; ValueError for splits and columns that are not there,
    and labels that are no classes.
    """
    if not name:
        raise ValueError("data.root must name the data set: a folder, a parquet file, or a name on the Hub")
    splits, stated = _load(name, config, streaming)
    chosen = train_split, test_split or next((split for split in _TEST_SPLITS if split in splits), "test")
    for split in chosen:
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}, it has {', '.join(splits)}")
    train, test = (_undecoded(splits[split], f"{name} ({split})", image_column, label_column) for split in chosen)
    places = [f"{name} ({split})" for split in chosen]
    if streaming:
        used = [_used(lengths[at], stated.get(split, 0), places[at]) for at, split in enumerate(chosen)]
        streams = [
            StreamData(*part, place, length, shuffle)
            for part, place, length in zip((train, test), places, used, strict=True)
        ]
        return streams[0], streams[1]
    classes = _classes_of([train, test], name)
    sets = [_by_number(*part, place, classes) for part, place in zip((train, test), places, strict=True)]
    return sets[0], sets[1]


def open_row(image: Any) -> Image:
    """The image of a row: {"bytes": ..., "path": ...}, of which one may be None."""
    if image is None:
        raise ValueError("the row has no image")
    if image["bytes"] is not None:
        return open_image(image["bytes"])
    return open_image(Path(image["path"]))


def _load(name: str, config: str, streaming: bool) -> tuple[Any, dict[str, int]]:
    """The splits, and for streams the numbers of their rows as far as they are stated."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("Hugging Face's data sets need datasets: pip install 'repkern[train]'") from None
    path = Path(name)
    if (path / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(name)
        lengths = {split: rows.num_rows for split, rows in found.items()}
        return {split: rows.to_iterable_dataset() for split, rows in found.items()} if streaming else found, lengths
    if path.suffix == ".parquet" and not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    packed = {"path": "parquet", "data_files": {"train": name}}
    source = packed if path.suffix == ".parquet" else {"path": name, "name": config or None}
    found = datasets.load_dataset(**source, streaming=streaming)
    if not streaming:
        return found, {}
    return found, _lengths(datasets.load_dataset_builder(**source))


def _lengths(builder: Any) -> dict[str, int]:
    """The numbers of rows that a data set states, or that the footers of its local parquet files do."""
    from pyarrow import parquet

    lengths = {split: int(info.num_examples or 0) for split, info in (builder.info.splits or {}).items()}
    for split, files in (builder.config.data_files or {}).items():
        if split not in lengths and all(Path(file).suffix == ".parquet" and Path(file).is_file() for file in files):
            lengths[str(split)] = sum(parquet.read_metadata(file).num_rows for file in files)
    return lengths


def _undecoded(rows: Any, where: str, image: str, label: str) -> tuple[Any, _Columns]:
    """The rows with their images as stored, and the columns."""
    import datasets

    features = rows.features
    if features is None:
        raise ValueError(f"{where} does not state its columns")
    image = image or _only(
        [name for name, kind in features.items() if isinstance(kind, datasets.Image)], "image", where
    )
    kinds = (datasets.ClassLabel,)
    label = label or _only([name for name, kind in features.items() if isinstance(kind, kinds)], "label", where)
    for name in (image, label):
        if name not in features:
            raise ValueError(f"{where} has no column {name!r}, it has {', '.join(features)}")
    classes = tuple(features[label].names) if isinstance(features[label], datasets.ClassLabel) else None
    return rows.cast_column(image, datasets.Image(decode=False)), _Columns(image, label, classes)


def _only(names: Sequence[str], what: str, where: str) -> str:
    if len(names) != 1:
        raise ValueError(f"{where} has {len(names)} {what} columns, name one (data.huggingface.{what}_column)")
    return names[0]


def _classes_of(parts: Sequence[tuple[Any, _Columns]], name: str) -> tuple[str, ...] | None:
    """The names that both parts share; None where labels are numbers."""
    named = [columns.classes for _, columns in parts]
    if named[0] != named[1]:
        raise ValueError(f"the splits of {name} have different classes")
    if named[0] is not None:
        return named[0]
    values = [set(rows.unique(columns.label)) for rows, columns in parts]
    if all(isinstance(value, int) for value in values[0] | values[1]):
        return tuple(map(str, range(max(values[0] | values[1]) + 1)))
    if not all(isinstance(value, str) for value in values[0] | values[1]):
        raise ValueError(f"the labels of {name} must be whole numbers or texts")
    if values[1] - values[0]:
        raise ValueError(
            f"the test split of {name} has classes that the training split lacks: {sorted(values[1] - values[0])[:5]}"
        )
    return tuple(sorted(values[0]))


def _by_number(rows: Any, columns: _Columns, where: str, classes: tuple[str, ...] | None) -> RowData:
    if len(rows) == 0:
        raise ValueError(f"{where} has no images")
    values = rows.with_format("numpy")[columns.label][:]
    if columns.classes is None and classes is not None and not isinstance(rows[0][columns.label], int):
        numbers = {name: number for number, name in enumerate(classes)}
        labels = torch.tensor([numbers[str(value)] for value in values])
    else:
        labels = torch.tensor([int(value) for value in values])
    return RowData(rows, columns._replace(classes=classes), where, labels)


def _used(length: int, stated: int, where: str) -> int:
    if stated and length > stated:
        raise ValueError(f"{where} has {stated} rows, {length} were asked for")
    if not length and not stated:
        raise ValueError(f"{where} does not state its number of rows: give data.limit and data.test_limit")
    return length or stated
