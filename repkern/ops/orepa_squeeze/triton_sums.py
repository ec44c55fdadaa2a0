"""Sums whose parts are written by different programs and added up afterwards, in a fixed order."""

from __future__ import annotations

import torch
import triton

from repkern.ops import _check
from repkern.ops._check import pointer
from repkern.ops._triton import TL_DTYPE, argument_table
from repkern.ops.orepa_squeeze import triton_kernels as kernels

__all__ = ["PartialSums"]

_BLOCK = 256


class PartialSums:
    """Where each launch writes its parts: in one buffer, or straight to the target when there is one part."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._size = 0
        self._total = 0
        self._rows: list[dict[str, int]] = []
        self._waiting: list[tuple[dict[str, int], str, dict[str, int], int]] = []
        self._buffer = torch.empty(0)

    def add(
        self, fields: dict[str, int], column: str, target: int, count: int, terms: int, terms_apart: int | None = None
    ) -> None:
        """Let `fields[column]` be the address of the parts of `count` sums of `terms` each.

        The parts of one sum lie `terms_apart` elements apart: 1, or (default) `count`. `target` 0: not wanted.
        """
        fields[column] = target
        if target == 0 or terms == 1:
            return
        apart = count if terms_apart is None else terms_apart
        row = {
            "first_tile": self._total, "target": target, "count": count, "terms": terms,
            "stride": terms if apart == 1 else 1, "stride_term": apart,
        }  # fmt: skip
        self._rows.append(row)
        self._waiting.append((fields, column, row, self._size))
        self._size += count * terms
        self._total += triton.cdiv(count, _BLOCK)

    def allocate(self) -> None:
        """Get the buffer and fill in the addresses."""
        self._buffer = _check.empty((self._size,), self._dtype, self._device)
        for fields, column, row, at in self._waiting:
            fields[column] = row["source"] = pointer(self._buffer) + at * self._dtype.itemsize

    def add_up(self) -> None:
        """Launch the additions."""
        if self._rows:
            table, count = argument_table(self._rows, kernels.SUM_COLUMNS, self._device)
            kernels.sum_kernel[(self._total,)](table, count, TL_DTYPE[self._dtype], _BLOCK)
