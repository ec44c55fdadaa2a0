"""Checks that protect memory, and what native calls need from a tensor. Texts name the got and the wanted value."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch

from repkern.ops._huge_pages import HUGE_PAGE, advise

__all__ = [
    "DTYPE_CODE",
    "addresses",
    "allow_tf32",
    "empty",
    "empty_like",
    "pointer",
    "require_floating",
    "require_odd",
    "require_same",
    "require_shape",
    "workspace",
]

# The values of repkern::DType in csrc/common/types.h.
DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def require_shape(op: str, name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """ValueError unless `tensor` has exactly `shape`."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: `{name}` must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def require_odd(op: str, name: str, size: int) -> None:
    """ValueError unless `size` is a positive odd number."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"{op}: the kernel size of `{name}` must be odd, got {size}")


def require_same(op: str, tensors: Mapping[str, torch.Tensor | None], dtypes: Sequence[torch.dtype]) -> None:
    """TypeError/ValueError unless all tensors share one device and one dtype out of `dtypes`."""
    first_name, first = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{op}: `{name}` must be one of {names}, got {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{op}: `{name}` must be a dense tensor, got layout {tensor.layout}")
        if first is None:
            first_name, first = name, tensor
        elif tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: `{name}` is {tensor.dtype} but `{first_name}` is {first.dtype}; all must share one dtype"
            )
        elif tensor.device != first.device:
            raise ValueError(
                f"{op}: `{name}` is on {tensor.device} but `{first_name}` is on {first.device}; one device is needed"
            )


def require_floating(op: str, dtype: torch.dtype) -> None:
    """TypeError unless `dtype` is one an op can write."""
    if dtype not in DTYPE_CODE:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPE_CODE)
        raise TypeError(f"{op}: out_dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}")


def pointer(tensor: torch.Tensor | None) -> int:
    """The address of a contiguous tensor, 0 for None. Keep the tensor bound to a local while it is in use."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The addresses of many tensors. Keep the tensors bound while they are in use."""
    return list(map(torch.Tensor.data_ptr, tensors))


def empty(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """The memory a native kernel writes to. All of it comes from here, so that tests can put guard bytes around it."""
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """As `empty`, with the shape, dtype and device of a contiguous tensor; a third of the Python time."""
    return torch.empty_like(tensor)


# What a thread keeps of its largest CPU workspace between calls. Fresh megabytes cost a page fault per 4 KiB, which
# at C = 128 was 40 % of the squeeze's backward.
KEPT_WORKSPACE_BYTES = 64 << 20
_kept = threading.local()


def workspace(size: int, device: torch.device) -> torch.Tensor:
    """At least `size` bytes, 64-byte aligned, of unknown content, for use until this thread's next call."""
    if device.type != "cpu":
        return _aligned(size, device)
    kept: torch.Tensor | None = getattr(_kept, "tensor", None)
    if kept is not None and size <= kept.numel() <= KEPT_WORKSPACE_BYTES:
        return kept
    fresh = _aligned(size, device)
    _kept.tensor = fresh if size <= KEPT_WORKSPACE_BYTES else None
    return fresh


def _aligned(size: int, device: torch.device) -> torch.Tensor:
    large = device.type == "cpu" and size >= HUGE_PAGE
    alignment = HUGE_PAGE if large else 64
    raw = empty((-(-size // alignment) * alignment + alignment,), torch.uint8, device)
    if large:
        advise(raw.data_ptr(), raw.nbytes)
    offset = -raw.data_ptr() % alignment
    return raw[offset : offset + size]


def allow_tf32() -> bool:
    """Whether torch's own fp32 matrix products may use TF32."""
    return torch.backends.cuda.matmul.allow_tf32
