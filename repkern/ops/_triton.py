"""What the Triton implementations share: a tile product, launch conditions and argument tables.

The only modules that may import this one are the `triton.py` and `triton_kernels.py` of an op, since it needs triton.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from repkern.ops import _check

__all__ = ["TL_DTYPE", "argument_table", "block_size", "dot_precision", "on_device", "tile_product"]

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
def tile_product(a: Any, b: Any, total: Any, PRECISION: tl.constexpr) -> Any:
    """total + a @ b for a [M, K], b [K, N]; PRECISION "none" stays off tl.dot, which not every GPU has in float64."""
    if PRECISION == "none":
        total += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


def dot_precision(dtype: torch.dtype) -> str:
    """The PRECISION of `tile_product` for operands of `dtype`, following torch.backends.cuda.matmul."""
    if dtype is torch.float64:
        return "none"
    return "tf32" if _check.allow_tf32() and torch.version.hip is None else "ieee"


def block_size(extent: int, low: int, high: int) -> int:
    """The power of two that covers `extent`, within [low, high]."""
    return min(max(triton.next_power_of_2(extent), low), high)


def argument_table(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """`rows` as int64 on `device`, ordered after the work queued on the current stream; never waits for the GPU."""
    if device.type == "cpu":
        return torch.tensor(rows, dtype=torch.int64)
    host = torch.tensor(rows, dtype=torch.int64, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _captured_tables.append(host)
    return host.to(device, non_blocking=True)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the one the tensors are on."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    if _INTERPRETED:
        raise RuntimeError(f"backend 'triton': TRITON_INTERPRET=1 runs CPU tensors only, got {device}; unset it")
    return torch.cuda.device(device)
