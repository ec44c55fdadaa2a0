"""The metrics of a run: one JSON object per epoch and line, and the same as CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from repkern.models.files import parse_json
from repkern.train.files import write_atomically

__all__ = ["MetricsLog"]


class MetricsLog:
    """`metrics.jsonl` and `metrics.csv` in `folder`. Every row has an "epoch", counted from 1."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = []

    def resume(self, epoch: int) -> None:
        """Take over the rows up to `epoch` and drop later ones. ValueError when they are not all there."""
        self.rows = [row for row in self._read() if row["epoch"] <= epoch]
        found = [row["epoch"] for row in self.rows]
        if found != list(range(1, epoch + 1)):
            raise ValueError(f"{self.path} should hold epochs 1 to {epoch}, got {found}")
        self._write()

    def append(self, row: dict[str, Any]) -> None:
        """Add the row of one finished epoch."""
        self.rows.append(row)
        self._write()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            rows = [parse_json(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            if not all(isinstance(row, dict) and type(row.get("epoch")) is int for row in rows):
                raise ValueError("every line must be an object with an epoch")
            return rows
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from None

    def _write(self) -> None:
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        table = io.StringIO()
        writer = csv.DictWriter(table, list(self.rows[0]) if self.rows else ["epoch"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path.with_suffix(".csv"), table.getvalue())
