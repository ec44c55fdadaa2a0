"""Checks that protect memory, and what native calls need from a tensor. Texts name the got and the wanted value."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from repkern.ops._huge_pages import HUGE_PAGE, advise

__all__ = [
    "DTYPE_CODE",
    "addresses",
    "allow_tf32",
    "any_lazy",
    "empty",
    "empty_like",
    "in_memory",
    "pointer",
    "require_fits",
    "require_floating",
    "require_integer",
    "require_number",
    "require_odd",
    "require_same",
    "require_shape",
    "require_tensor",
    "require_tensors",
    "workspace",
]

# The values of repkern::DType in csrc/common/types.h.
DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


# More bytes than a process can address. Kernels multiply such sizes by small constants in 64 bits, so all that stays
# below it cannot overflow there.
MOST_BYTES = 1 << 47
_INT64 = 1 << 63


def require_fits(op: str, what: str, *factors: int, most: int = MOST_BYTES) -> None:
    """ValueError unless the product of `factors` is at most `most`: what a kernel works out of it in 64 bits then fits.

    The one place where sizes, products and offsets are bounded. Python's integers do not overflow.
    """
    product = math.prod(factors)
    if product > most:
        raise ValueError(f"{op}: {what} must be at most {most}, got {' x '.join(map(str, factors))} = {product}")


def require_integer(op: str, name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int.

    TypeError for what is not a whole number, bool included; ValueError below `least` and outside 64 bits.
    """
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool):
        raise TypeError(f"{op}: `{name}` must be an integer, got {value}")
    try:
        number = value if type(value) is int else operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: `{name}` must be an integer, got {_told(value)}") from None
    if least is not None and number < least:
        raise ValueError(f"{op}: `{name}` must be at least {least}, got {number}")
    if not -_INT64 <= number < _INT64:
        raise ValueError(f"{op}: `{name}` must fit in 64 bits, got {number}")
    return number


def require_number(op: str, name: str, value: Any, least: float | None = None, below: float | None = None) -> float:
    """`value` as a float. TypeError for what is not a real number; ValueError unless finite, >= least and < below."""
    if isinstance(value, bool | str | bytes):
        raise TypeError(f"{op}: `{name}` must be a number, got {_told(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{op}: `{name}` must be a number, got {_told(value)}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{op}: `{name}` must be finite, got {number}")
    if least is not None and not number >= least:
        raise ValueError(f"{op}: `{name}` must be at least {least:g}, got {number}")
    if below is not None and not number < below:
        raise ValueError(f"{op}: `{name}` must be below {below:g}, got {number}")
    return number


def require_tensor(op: str, name: str, value: Any, optional: bool = False) -> None:
    """TypeError unless `value` is a tensor, or None where that is allowed."""
    if not isinstance(value, torch.Tensor) and not (optional and value is None):
        raise TypeError(f"{op}: `{name}` must be a tensor{' or None' if optional else ''}, got {_told(value)}")


def require_tensors(op: str, name: str, values: Any) -> list[torch.Tensor]:
    """`values` as a list. TypeError unless it is a sequence of tensors; one tensor is not a list of its rows."""
    if isinstance(values, torch.Tensor | str | bytes | Mapping):
        raise TypeError(f"{op}: `{name}` must be a list of tensors, got {_told(values)}")
    try:
        listed = list(values)
    except TypeError:
        raise TypeError(f"{op}: `{name}` must be a list of tensors, got {_told(values)}") from None
    for at, value in enumerate(listed):
        require_tensor(op, f"{name}[{at}]", value)
    return listed


def _told(value: Any) -> str:
    """A value in an error's text: short, and of a tensor no numbers."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


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
        require_tensor(op, name, tensor)
        if tensor.dtype not in dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{op}: `{name}` must be one of {names}, got {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{op}: `{name}` must be a dense tensor, got layout {tensor.layout}")
        require_fits(op, f"the bytes of `{name}`", tensor.numel(), tensor.itemsize)
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


def require_floating(op: str, dtype: torch.dtype, what: str = "out_dtype") -> None:
    """TypeError unless `dtype`, that of `what`, is one an op can write."""
    if dtype not in DTYPE_CODE:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPE_CODE)
        raise TypeError(f"{op}: {what} must be one of {names}, got {str(dtype).removeprefix('torch.')}")


_is_neg, _is_zero = torch.Tensor.is_neg, torch.Tensor._is_zerotensor


def any_lazy(values: Sequence[Any]) -> bool:
    """Whether the memory of a tensor does not hold its values: a pending sign, or zeros that have no memory at all.

    The dispatcher writes such values out before a kernel; who goes past it asks here. Pending conjugations are of
    complex tensors only, which every check refuses.
    """
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return any(map(_is_neg, tensors)) or any(map(_is_zero, tensors))


def in_memory(value: Any) -> Any:
    """A tensor, or list of them, with the values in memory, itself if they are; anything else as it is."""
    if isinstance(value, list):
        return [in_memory(one) for one in value] if any_lazy(value) else value
    if not isinstance(value, torch.Tensor) or not (_is_neg(value) or _is_zero(value)):
        return value
    return torch.zeros_like(value) if _is_zero(value) else value.resolve_neg()


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
