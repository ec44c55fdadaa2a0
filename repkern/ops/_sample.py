"""A call of an op with inputs worth testing; every op folder has a samples.py that makes some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Sample"]


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of an op, tensors in float64 on the CPU.

    lengths: for every output, the number of products in its longest sum (error bounds are computed from it).
    out_dtype: the dtype outputs are rounded to, when not the computation's. slow: left out for interpreted backends.
    bounds: (args, dtype) -> an error bound per output, for ops that are no sums of products; `lengths` is then unused.
    """

    name: str
    args: tuple[Any, ...]
    lengths: tuple[int, ...]
    out_dtype: torch.dtype | None = None
    slow: bool = False
    bounds: Callable[[tuple[Any, ...], torch.dtype], list[torch.Tensor]] | None = None

    def __str__(self) -> str:
        return self.name
