"""The tensors of an optimizer step as the table that the kernels read (csrc/common/grad_mult.h)."""

from __future__ import annotations

import functools
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._check import DTYPE_CODE
from repkern.ops._grad_mult import CENTRE, DENSE, NONE, Packed, Vectors, changed_tensors
from repkern.ops._grad_mult_plan import Plan
from repkern.ops._library import Native
from repkern.ops._overlap import refuse_overlaps

__all__ = [
    "CHUNK_SIZE",
    "Static",
    "constant_table",
    "in_order",
    "launches",
    "moving_table",
    "number_view",
    "static_table",
]

# Columns of one number per tensor, in the order of csrc/common/grad_mult.h.
ADDRESS_COLUMNS, NUMBER_COLUMNS, SHAPE_COLUMNS = 9, 3, 7
_STATES = 3
# Elements of a chunk. On the CPU a chunk is long enough for the prefetcher to follow its streams; on a GPU short
# enough that the last blocks of a launch end together.
CHUNK_SIZE = {"cpu": 131072, "cuda": 8192, "simt": 8192}
_T = TypeVar("_T")
# A replayed CUDA graph reads these again.
_captured: list[Tensor] = []


class Static(NamedTuple):
    """What stays the same from step to step, on the parameters' device."""

    shapes: Tensor  # int64 [7, n]
    chunks: Tensor  # int32 [m, 2]: tensor, number of the chunk in it
    launches: tuple[tuple[torch.dtype, int, int], ...]  # dtype, first chunk and how many
    arrived: Tensor  # int32 [1], zero between launches


def static_table(plan: Plan, chunk_size: int, stream: int) -> Static:
    """Shapes and chunks of `plan` on its device, kept for the next step. `stream`: whose order the upload follows."""
    table = _static_table(plan, chunk_size, stream)
    return _kept_while_captured(table, table.shapes, table.chunks, table.arrived)


@functools.lru_cache(maxsize=64)
def _static_table(plan: Plan, chunk_size: int, stream: int) -> Static:
    rows = [(t.size, t.kind, t.row, t.taps, t.inner, t.diagonal, DTYPE_CODE[t.dtype]) for t in plan.tensors]
    shapes = array("q", [cell for column in zip(*rows, strict=True) for cell in column])
    chunks = array("i")
    launches: list[tuple[torch.dtype, int, int]] = []
    for dtype in dict.fromkeys(t.dtype for t in plan.tensors):
        first = len(chunks) // 2
        for at, tensor in enumerate(plan.tensors):
            if tensor.dtype is dtype:
                # One chunk at least: it is the first chunk of a tensor that counts its steps.
                for part in range(max(1, -(-tensor.size // chunk_size))):
                    chunks.extend((at, part))
        launches.append((dtype, first, len(chunks) // 2 - first))
    arrived = torch.zeros(1, dtype=torch.int32, device=plan.device)
    return Static(
        _upload(shapes.tobytes(), torch.int64, plan.device),
        _upload(chunks.tobytes(), torch.int32, plan.device).view(-1, 2),
        tuple(launches),
        arrived,
    )


def moving_table(
    plan: Plan,
    lists: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    packed: Packed,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    first_step: Sequence[int],
    stream: int,
) -> Tensor:
    """Addresses int64 [9, n] and numbers float64 [3, n] behind them, as int64 [12, n] on the plan's device.

    `lists`: params, grads and up to three kinds of state. The last tables are kept: what did not change since an
    earlier step is not sent again, and nothing waits for the device.
    """
    count = len(plan.tensors)
    addresses = [address for tensors in lists for address in _check.addresses(tensors)]
    _refuse_shared(addresses, lists, plan)
    addresses += [0] * ((2 + _STATES) * count - len(addresses))
    addresses += _check.addresses(steps) if steps else [0] * count
    addresses += _multiplier_columns(plan, packed.tensors)
    addresses += first_step
    data = array("q", addresses).tobytes() + array("d", (*lr, *weight_decay, *packed.identity)).tobytes()
    if plan.device.type == "cpu":
        return _upload(data, torch.int64, plan.device)
    return _kept_while_captured(*[_moving_table(data, plan.device, stream)] * 2)


def _multiplier_columns(plan: Plan, tensors: list[Tensor]) -> list[int]:
    """The addresses of multipliers, then of centres."""
    if isinstance(tensors, Vectors) and tensors.addresses is not None:
        return tensors.addresses
    multiplier, centre = [0] * len(plan.tensors), [0] * len(plan.tensors)
    addresses = _check.addresses(tensors)
    for at, tensor in enumerate(plan.tensors):
        if tensor.kind != NONE:
            multiplier[at] = addresses[tensor.slot]
            if tensor.kind == CENTRE:
                centre[at] = addresses[tensor.slot + 1]
    if isinstance(tensors, Vectors):
        tensors.addresses = multiplier + centre
    return multiplier + centre


@functools.lru_cache(maxsize=16)
def _moving_table(data: bytes, device: torch.device, stream: int) -> Tensor:
    return _upload(data, torch.int64, device)


def number_view(moving: Tensor, count: int) -> Tensor:
    """The numbers of a moving table of `count` tensors, float64."""
    return moving[ADDRESS_COLUMNS * count :].view(torch.float64)


@functools.lru_cache(maxsize=16)
def constant_table(values: tuple[float, ...], device: torch.device, stream: int) -> Tensor:
    """Numbers that hold for all tensors, float64 on `device`: a kernel argument would be rounded to float32."""
    return _upload(array("d", values).tobytes(), torch.float64, device)


def _upload(data: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    host = torch.frombuffer(bytearray(data), dtype=dtype)
    if device.type == "cpu":
        return host
    pinned = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def _kept_while_captured(answer: _T, *tensors: Tensor) -> _T:
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.extend(tensors)
    return answer


# Where the tensors of a plan's last steps lay: checked once, then compared.
_known_places: weakref.WeakKeyDictionary[Plan, list[list[int]]] = weakref.WeakKeyDictionary()
_KEPT_PLACES = 4


def _refuse_shared(addresses: list[int], lists: Sequence[Sequence[Tensor]], plan: Plan) -> None:
    """ValueError where tensors that a step changes share memory. `lists`: as in `moving_table`."""
    known = _known_places.setdefault(plan, [])
    if addresses in known:
        return
    refuse_overlaps("grad_mult", changed_tensors(lists))
    known.append(list(addresses))
    del known[:-_KEPT_PLACES]


@contextmanager
def in_order(
    plan: Plan, lists: Sequence[list[Tensor]], packed: Packed, mutable: Sequence[int]
) -> Iterator[tuple[list[list[Tensor]], Packed]]:
    """The tensors with copies in place of those that lie in another order than their parameter.

    On leaving, the copies of `mutable` lists are written back.
    """
    if not plan.reordered:
        yield list(lists), packed
        return
    moved = [list(tensors) for tensors in lists]
    multipliers = list(packed.tensors)
    for number, at in plan.reordered:
        tensor = plan.tensors[at]
        layout = torch.channels_last if tensor.channels_last else torch.contiguous_format
        if number < 0:
            multipliers[tensor.slot] = multipliers[tensor.slot].contiguous(
                memory_format=layout if tensor.kind == DENSE else torch.contiguous_format
            )
            if tensor.kind == CENTRE:
                multipliers[tensor.slot + 1] = multipliers[tensor.slot + 1].contiguous()
        else:
            moved[number][at] = moved[number][at].clone(memory_format=layout)
    yield moved, packed._replace(tensors=multipliers)
    for number, at in plan.reordered:
        if number in mutable:
            lists[number][at].copy_(moved[number][at])


_SHORTEST, _FEWEST = 8192, 16


def _chunk_size(backend: str, plan: Plan) -> int:
    """Shorter for small networks, so that every thread has something to do."""
    size, total = CHUNK_SIZE[backend], plan.size
    while size > _SHORTEST and total < _FEWEST * size:
        size //= 2
    return size


def launches(
    native: Native,
    plan: Plan,
    lists: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    packed: Packed,
    numbers: tuple[Sequence[float], Sequence[float], Sequence[int]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    counts_steps: bool = False,
) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """For every native call, the fields of GradMultTable and where to run: threads, or (dtype, [arrived,] stream).

    `numbers`: learning rates, weight decays and marks of first steps. One call on the CPU, else one for each dtype.
    """
    size, stream = _chunk_size(native.backend, plan), native.stream(plan.device)
    static = static_table(plan, size, stream)
    moving = moving_table(plan, lists, steps, packed, *numbers, stream)
    count = len(plan.tensors)
    start, chunks = _check.pointer(moving), _check.pointer(static.chunks)
    head = [count, start, start + ADDRESS_COLUMNS * count * 8, _check.pointer(static.shapes)]
    tail = [size, _check.pointer(grad_scale), _check.pointer(found_inf)]
    if native.suffix == "cpu":
        yield [*head, chunks, len(static.chunks), *tail], (torch.get_num_threads(),)
        return
    for dtype, first, number in static.launches:
        arrived = (_check.pointer(static.arrived),) if counts_steps else ()
        yield [*head, chunks + first * 8, number, *tail], (DTYPE_CODE[dtype], *arrived, stream)
