"""Checks of all tensors of an optimizer step against each other, and the plan worked out from their shapes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._grad_mult import (
    CENTRE,
    CPU,
    DENSE,
    SCALE,
    TENSORS,
    Packed,
    Vectors,
    check_kernel,
    facts_of,
    refuse_twice,
    state_dtype,
)

__all__ = ["Plan", "TensorPlan", "plan_for"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LONGEST_ROW = 2**30  # kernels count inside a row with 32 bits


@dataclass(frozen=True)
class TensorPlan:
    """One parameter as the kernels see it: a flat run of numbers cut into rows, one row an output channel.

    Position r of a row belongs to kernel position r / inner % taps, of which the middle one is the centre; `inner` is
    1 for contiguous weights and Ci/g for channels_last ones. The identity's input channel is o mod `diagonal`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: int
    slot: int  # of the first multiplier tensor
    channels_last: bool
    size: int
    row: int
    taps: int
    inner: int
    diagonal: int


@dataclass(frozen=True, eq=False)  # hashed by identity: tables are kept per plan
class Plan:
    """What `check` found: one row per parameter, and the tensors that are not in their parameter's order."""

    tensors: tuple[TensorPlan, ...]
    device: torch.device
    # (list, parameter); lists count from 0: params, grads, state; -1 are multipliers
    reordered: tuple[tuple[int, int], ...]
    size: int  # of all parameters together


def _one_each(facts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Facts with a stride and a device for every tensor."""
    shapes, strides, dtypes, devices = facts
    if strides is None:
        strides = tuple(torch.empty(shape, device="meta").stride() for shape in shapes)
    return shapes, strides, dtypes, (CPU,) * len(shapes) if devices is CPU else devices


def plan_for(op: str, names: tuple[str, ...], lists: Sequence[Sequence[Tensor]], packed: Packed) -> Plan:
    """Checks all tensors against each other and plans them; `lists` are params, grads and each kind of state.

    Raises TypeError or ValueError naming the list, the index, the got and the wanted value. The same shapes are
    checked once: the answer is kept.
    """
    params = lists[0]
    refuse_twice(op, "params", params)
    for name, tensors in zip(names, lists, strict=True):
        if len(tensors) != len(params):
            raise ValueError(f"{op}: {len(params)} parameters, but {len(tensors)} `{name}`")
        if not all(issubclass(kind, Tensor) for kind in set(map(type, tensors))):
            at = next(at for at, tensor in enumerate(tensors) if not isinstance(tensor, Tensor))
            raise TypeError(f"{op}: `{name}[{at}]` must be a tensor, got {type(tensors[at]).__name__}")
    try:
        facts = tuple(facts_of(tensors) for tensors in lists)
    except RuntimeError:
        for name, tensors in zip(names, lists, strict=True):
            for at, tensor in enumerate(tensors):
                if tensor.layout is not torch.strided:
                    got = f"got layout {tensor.layout}; no sparse gradients"
                    raise TypeError(f"{op}: `{name}[{at}]` must be dense, {got}") from None
        raise
    of_multipliers = packed.tensors.facts if isinstance(packed.tensors, Vectors) else facts_of(packed.tensors)
    key = (op, names, facts, of_multipliers, tuple(packed.layout), tuple(packed.identity))
    try:
        return _plan(*key)
    except TypeError as error:
        if "unhashable" not in str(error):  # symbolic sizes
            raise
        return _plan.__wrapped__(*key)


@functools.lru_cache(maxsize=256)
def _plan(
    op: str,
    names: tuple[str, ...],
    facts: tuple[Any, ...],
    multiplier_facts: tuple[Any, ...],
    layout: tuple[int, ...],
    identity: tuple[float, ...],
) -> Plan:
    facts, multiplier_facts = tuple(map(_one_each, facts)), _one_each(multiplier_facts)
    (shapes, strides, dtypes, devices), *others = facts
    count = len(shapes)
    if len(layout) != 2 * count or len(identity) != count:
        raise ValueError(f"{op}: {count} parameters, but multipliers for {len(layout) // 2} and {len(identity)}")
    slots = [0]
    for kind in layout[::2]:
        if kind not in TENSORS:
            raise ValueError(f"{op}: a multiplier's kind is one of {tuple(TENSORS)}, got {kind}")
        slots.append(slots[-1] + TENSORS[kind])
    if slots[-1] != len(multiplier_facts[0]):
        raise ValueError(f"{op}: {slots[-1]} multiplier tensors are needed, got {len(multiplier_facts[0])}")
    tensors = []
    for at in range(count):
        where = f"params[{at}]"
        if dtypes[at] not in DTYPES:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            got = str(dtypes[at]).removeprefix("torch.")
            raise TypeError(f"{op}: `{where}` must be one of {wanted}, got {got}")
        if devices[at] != devices[0]:
            raise ValueError(f"{op}: `{where}` is on {devices[at]} but `params[0]` is on {devices[0]}")
        for name, (others_shape, _, others_dtype, others_device) in zip(names[1:], others, strict=True):
            wanted_dtype = dtypes[at] if name == "grads" else state_dtype(dtypes[at])
            wanted_fact = (shapes[at], wanted_dtype, devices[at])
            _require(op, f"{name}[{at}]", (others_shape[at], others_dtype[at], others_device[at]), wanted_fact)
        _check.require_fits(op, f"the bytes of `{where}`", *shapes[at], 8)
        kind, groups = layout[2 * at], layout[2 * at + 1]
        if kind in (SCALE, CENTRE):
            check_kernel(op, where, tuple(shapes[at]), kind, groups, identity[at])
        for slot in range(slots[at], slots[at + 1]):
            wanted_shape = shapes[at] if kind == DENSE else shapes[at][:1]
            got_fact = (multiplier_facts[0][slot], multiplier_facts[2][slot], multiplier_facts[3][slot])
            wanted_fact = (wanted_shape, state_dtype(dtypes[at]), devices[at])
            _require(op, f"the multiplier of {where}", got_fact, wanted_fact)
        tensors.append(_plan_tensor(op, where, shapes[at], strides[at], dtypes[at], (kind, groups), slots[at]))
    reordered = [
        (number, at)
        for number, (_, other_strides, _, _) in enumerate(facts)
        for at, tensor in enumerate(tensors)
        if not _in_order(tensor.shape, other_strides[at], tensor.channels_last)
    ]
    reordered += [
        (-1, at)
        for at, tensor in enumerate(tensors)
        for slot in range(slots[at], slots[at + 1])
        if not _in_order(
            multiplier_facts[0][slot], multiplier_facts[1][slot], tensor.kind == DENSE and tensor.channels_last
        )
    ]
    return Plan(tuple(tensors), devices[0], tuple(reordered), sum(tensor.size for tensor in tensors))


def _require(op: str, what: str, got: tuple[Any, Any, Any], wanted: tuple[Any, Any, Any]) -> None:
    if tuple(got[0]) != tuple(wanted[0]):
        raise ValueError(f"{op}: `{what}` must have shape {tuple(wanted[0])}, got {tuple(got[0])}")
    if got[1] != wanted[1]:
        raise TypeError(f"{op}: `{what}` must be {wanted[1]}, got {got[1]}")
    if got[2] != wanted[2]:
        raise ValueError(f"{op}: `{what}` is on {got[2]} but its parameter is on {wanted[2]}")


def _in_order(shape: Sequence[int], strides: Sequence[int], channels_last: bool) -> bool:
    """Whether the numbers lie in one run, in that order; strides of dimensions of size 1 say nothing."""
    order = (1, 3, 2, 0) if channels_last else tuple(reversed(range(len(shape))))
    run = 1
    for dim in order:
        if shape[dim] == 0:
            return True
        if shape[dim] != 1 and strides[dim] != run:
            return False
        run *= shape[dim]
    return True


def _plan_tensor(
    op: str,
    where: str,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    multiplier: tuple[int, int],
    slot: int,
) -> TensorPlan:
    kind, groups = multiplier
    contiguous = _in_order(shape, strides, False)
    channels_last = not contiguous and len(shape) == 4 and _in_order(shape, strides, True)
    size = math.prod(shape)
    row, taps, inner, diagonal = max(size, 1), 1, 1, 1
    if kind in (SCALE, CENTRE):
        # At least 1: kernels divide by these even where there is nothing to do.
        taps = max(shape[2] * shape[3], 1)
        row, inner, diagonal = max(shape[1], 1) * taps, shape[1] if channels_last else 1, max(shape[0] // groups, 1)
        if row > _LONGEST_ROW:
            raise ValueError(f"{op}: `{where}` has {row} numbers an output channel, more than {_LONGEST_ROW}")
    return TensorPlan(tuple(shape), dtype, kind, slot, channels_last, size, row, taps, inner, diagonal)
