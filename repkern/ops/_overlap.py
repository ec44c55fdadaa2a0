"""Tensors that an in-place op changes must not share memory: their common elements would be updated twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from repkern.ops import _check

__all__ = ["overlapping", "refuse_overlaps"]


def overlapping(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The numbers of two tensors that share an element in memory, None where there are none.

    Views that are interleaved in the same memory, as the columns of a matrix, share none.
    """
    spans = sorted(
        (begin, end, at) for at, t in enumerate(tensors) if (begin := _check.pointer(t)) < (end := begin + _extent(t))
    )
    open_spans: list[tuple[int, int, int]] = []
    for span in spans:
        open_spans = [other for other in open_spans if other[1] > span[0]]
        for other in open_spans:
            if _share_elements(tensors[other[2]], tensors[span[2]]):
                return min(other[2], span[2]), max(other[2], span[2])
        open_spans.append(span)
    return None


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to behind the last element; 0 for tensors without elements or memory."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """For tensors whose spans meet: exact, by marking the bytes of both."""
    if _is_dense(a) and _is_dense(b):
        return True
    first = min(_check.pointer(a), _check.pointer(b))
    length = max(_check.pointer(a) + _extent(a), _check.pointer(b) + _extent(b)) - first
    marks = torch.zeros(length, dtype=torch.bool)

    def bytes_of(tensor: Tensor) -> Tensor:
        size, item = tensor.itemsize, _check.pointer(tensor) - first
        strides = [stride * size for stride in tensor.stride()]
        return marks.as_strided((*tensor.shape, size), (*strides, 1), item)

    bytes_of(a).fill_(True)
    return bool(bytes_of(b).any())


def _is_dense(tensor: Tensor) -> bool:
    return _extent(tensor) == tensor.numel() * tensor.itemsize


def refuse_overlaps(op: str, named: Mapping[str, Tensor]) -> None:
    """ValueError, naming both, where two of the tensors share an element."""
    found = overlapping(list(named.values()))
    if found is not None:
        other, one = (list(named)[at] for at in found)
        raise ValueError(f"{op}: `{one}` and `{other}` lie in the same memory: what they share would be updated twice")
