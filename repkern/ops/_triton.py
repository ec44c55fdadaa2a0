"""What the Triton implementations share: a tile product, launch conditions and argument tables.

The only modules that may import this one are the `triton.py` and `triton_kernels.py` of an op, since it needs triton.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from repkern.ops import _check

__all__ = [
    "TL_DTYPE",
    "argument_table",
    "block_size",
    "contraction_size",
    "dot_precision",
    "launch_options",
    "loop_bound",
    "on_device",
    "stored_dtype",
    "tile_product",
]

TL_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A replayed CUDA graph reads these again.
_captured_tables: list[torch.Tensor] = []


@triton.jit
def tile_product(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """total + a @ b for a [M, K], b [K, N]; PRECISION "none" stays off tl.dot, which not every GPU has in float64."""
    if PRECISION == "none":
        total += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


if _INTERPRETED:

    def loop_bound(value: Any) -> Any:
        """`value` for range(): the interpreter holds scalars as arrays of one, which NumPy 2.4 makes no index of."""
        return value if isinstance(value, int) else int(value.handle.data.item())

else:

    @triton.jit
    def loop_bound(value: tl.tensor) -> tl.tensor:
        """`value` for range()."""
        return value


def dot_precision(dtype: torch.dtype) -> str:
    """The PRECISION of `tile_product` for operands of `dtype`, following torch.backends.cuda.matmul."""
    if dtype is torch.float64:
        return "none"
    return "tf32" if _check.allow_tf32() and torch.version.hip is None else "ieee"


def contraction_size(precision: str) -> int:
    """The K of a tile product: short where it is unrolled into multiply-adds on registers."""
    return 32 if precision == "tf32" else 16


def launch_options(rows: int, columns: int) -> dict[str, int]:
    """Options for programs that hold `rows` x `columns` sums: with 4 warps, 64 x 64 would spill registers."""
    return {"num_warps": 8 if rows * columns > 1024 else 4, "num_stages": 2}


def stored_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> torch.dtype:
    """What a kernel computing in `dtype` should store for `out_dtype`; the caller converts the rest of the way.

    The interpreter cuts off instead of rounding to bfloat16.
    """
    return dtype if _INTERPRETED and out_dtype is torch.bfloat16 else out_dtype


def block_size(extent: int, low: int, high: int) -> int:
    """The power of two that covers `extent`, within [low, high]."""
    return min(max(triton.next_power_of_2(extent), low), high)


def argument_table(
    rows: Sequence[Mapping[str, int]], columns: Sequence[str], device: torch.device
) -> tuple[torch.Tensor, int]:
    """`rows` as int64 [power of two, columns] on `device`, and that power of two; missing cells are 0.

    The rows added hold the largest int32, so a column of first tiles stays sorted. Never waits for the GPU.
    """
    count = triton.next_power_of_2(len(rows))
    cells = [[row.get(column, 0) for column in columns] for row in rows]
    cells += [[0x7FFFFFFF] * len(columns)] * (count - len(rows))
    if device.type == "cpu":
        return torch.tensor(cells, dtype=torch.int64), count
    host = torch.tensor(cells, dtype=torch.int64, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _captured_tables.append(host)
    return host.to(device, non_blocking=True), count


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the one the tensors are on."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    if _INTERPRETED:
        raise RuntimeError(f"backend 'triton': TRITON_INTERPRET=1 runs CPU tensors only, got {device}; unset it")
    return torch.cuda.device(device)
