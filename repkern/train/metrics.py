"""The metrics of a run: one JSON object per epoch and line, and the same as CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repkern.models.files import parse_json
from repkern.train.files import write_atomically

__all__ = ["TIMES", "MetricsLog", "read_rows"]

#: What differs between two runs that compute the same.
TIMES = ("seconds", "images_per_second")


class MetricsLog:
    """`metrics.jsonl` and `metrics.csv` in `folder`, written as a whole: the rows themselves are in the checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace both files. OSError with the path when they cannot be written."""
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        columns = list(dict.fromkeys(name for row in rows for name in row)) or ["epoch"]
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path.with_suffix(".csv"), table.getvalue())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the training in `folder`, [] before the first. ValueError for a damaged file."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        rows = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(row, dict) and type(row.get("epoch")) is int for row in rows):
            raise ValueError("every line must be an object with an epoch")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return rows
