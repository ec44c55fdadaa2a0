"""What every part of branch_norm_add agrees on: codes, checks and the plan worked out from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repkern.ops import _check

__all__ = [
    "ACTIVATIONS",
    "AS_IS",
    "BATCH",
    "GIVEN",
    "MOST_BRANCHES",
    "OP",
    "NormPlan",
    "check_call",
    "check_maps",
    "check_statistics",
    "map_format",
    "statistics_dtype",
]

OP = "branch_norm_add"
# The values of repkern::NormMode and repkern::NormActivation in csrc/branch_norm_add/branch_norm_add.h.
BATCH, GIVEN, AS_IS = 0, 1, 2
ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish")
MOST_BRANCHES = 16

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)


class NormPlan(NamedTuple):
    """What a call needs to know besides its tensors. Lists are by branch; -1 where the branch has none."""

    modes: list[int]
    norm_slots: list[int]  # position in weights, biases and eps
    batch_slots: list[int]  # row of mean and var
    given_slots: list[int]  # position in means and vars
    norms: int
    batch_norms: int
    param_dtype: torch.dtype
    statistics_dtype: torch.dtype


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums of maps of `dtype` are kept in."""
    return torch.float32 if dtype in _HALF else dtype


def map_format(tensor: Tensor) -> torch.memory_format:
    """The layout a call works in, that of its first map: channels_last if it is, else contiguous."""
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def check_maps(op: str, branches: Sequence[Tensor]) -> None:
    """ValueError or TypeError unless there are 1 to 16 non-empty maps [N, C, H, W] of one shape, dtype and device."""
    if not 1 <= len(branches) <= MOST_BRANCHES:
        raise ValueError(f"{op}: 1 to {MOST_BRANCHES} branches are needed, got {len(branches)}")
    _check.require_same(op, {f"branches[{b}]": y for b, y in enumerate(branches)}, _DTYPES)
    shape = branches[0].shape
    if len(shape) != 4:
        raise ValueError(f"{op}: `branches[0]` must have shape [N, C, H, W], got {tuple(shape)}")
    if 0 in shape:
        raise ValueError(f"{op}: the branches must not be empty, got shape {tuple(shape)}")
    for b, y in enumerate(branches[1:], 1):
        _check.require_shape(op, f"branches[{b}]", y, shape)


def check_statistics(op: str, branches: Sequence[Tensor]) -> None:
    """As `check_maps`, and ValueError unless a channel has more than one value."""
    check_maps(op, branches)
    _require_several_values(op, branches[0])


def check_call(
    op: str,
    branches: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    modes: Sequence[int],
    eps: Sequence[float],
    activation: int,
) -> NormPlan:
    """Check all that a forward call gets; the plan.

    A training step calls each layer with the shapes of the step before: what was once right is looked up.
    """
    for at, value in enumerate(eps):
        _check.require_number(op, f"eps[{at}]", value, 0)
    key = _key_of(branches, (weights, biases, means, variances), modes, eps, activation)
    try:
        known = _plans.get(key)
    except TypeError:  # symbolic shapes under torch.compile cannot be hashed
        key = known = None
    if known is not None:
        return known
    plan = _check_call(op, branches, (weights, biases, means, variances), modes, eps, activation)
    if key is not None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _key_of(
    branches: Sequence[Tensor],
    lists: Sequence[Sequence[Tensor]],
    modes: Sequence[int],
    eps: Sequence[float],
    activation: int,
) -> tuple[object, ...] | None:
    """All that the checks look at; None for a call that is not as uniform as a good one."""
    if not branches:
        return None
    first = branches[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    parameters = [t for tensors in lists for t in tensors]
    tensors = [*branches, *parameters]
    if not all([t.device == device and t.layout is torch.strided for t in tensors]):
        return None
    if not all([y.dtype is dtype and y.shape == shape for y in branches]):
        return None
    param_dtype = parameters[0].dtype if parameters else None
    if not all([t.dtype is param_dtype for t in parameters]):
        return None
    lengths = (len(branches), *map(len, lists), len(eps))
    return (
        shape,
        dtype,
        device.type,
        param_dtype,
        tuple([t.shape for t in parameters]),
        lengths,
        tuple(modes),
        activation,
    )


_MOST_PLANS = 4096  # a model has one per call; more than this means shapes that never return
_plans: dict[tuple[object, ...] | None, NormPlan] = {}


def _check_call(
    op: str,
    branches: Sequence[Tensor],
    lists: Sequence[Sequence[Tensor]],
    modes: Sequence[int],
    eps: Sequence[float],
    activation: int,
) -> NormPlan:
    check_maps(op, branches)
    first = branches[0]
    if len(modes) != len(branches) or any(mode not in (BATCH, GIVEN, AS_IS) for mode in modes):
        raise ValueError(f"{op}: `modes` must hold 0, 1 or 2 for each of {len(branches)} branches, got {list(modes)}")
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(f"{op}: `activation` must be a code from 0 to {len(ACTIVATIONS) - 1}, got {activation}")
    norms, given = sum(mode != AS_IS for mode in modes), sum(mode == GIVEN for mode in modes)
    weights, biases, means, variances = lists
    wanted: tuple[tuple[str, int, Sequence[object]], ...] = (
        ("weights", norms, weights),
        ("biases", norms, biases),
        ("eps", norms, eps),
        ("means", given, means),
        ("vars", given, variances),
    )
    for name, length, values in wanted:
        if len(values) != length:
            raise ValueError(f"{op}: `{name}` needs {length} entries for modes {list(modes)}, got {len(values)}")
    if BATCH in modes:
        _require_several_values(op, first)
    param_dtype = _check_parameters(op, first, weights=weights, biases=biases, means=means, vars=variances)
    return _plan(modes, param_dtype, statistics_dtype(first.dtype))


def _require_several_values(op: str, y: Tensor) -> None:
    if y.shape[0] * y.shape[2] * y.shape[3] == 1:
        raise ValueError(
            f"{op}: Expected more than 1 value per channel when normalizing with batch statistics, "
            f"got input size {tuple(y.shape)}"
        )


def _check_parameters(op: str, like: Tensor, **lists: Sequence[Tensor]) -> torch.dtype:
    named = {f"{name}[{i}]": t for name, tensors in lists.items() for i, t in enumerate(tensors)}
    wide = statistics_dtype(like.dtype)
    if not named:
        return wide
    _check.require_same(op, named, _DTYPES)
    for name, tensor in named.items():
        if tensor.dtype not in (wide, like.dtype):
            raise TypeError(
                f"{op}: `{name}` is {tensor.dtype} but the branches are {like.dtype}; "
                f"all must share one dtype, or parameters be {wide}"
            )
        if tensor.device != like.device:
            raise ValueError(f"{op}: `{name}` is on {tensor.device} but the branches are on {like.device}")
        _check.require_shape(op, name, tensor, (like.shape[1],))
    return next(iter(named.values())).dtype


def _plan(modes: Sequence[int], param_dtype: torch.dtype, wide: torch.dtype) -> NormPlan:
    def places(*wanted: int) -> list[int]:
        found = 0
        slots: list[int] = []
        for mode in modes:
            slots.append(found if mode in wanted else -1)
            found += mode in wanted
        return slots

    slots = places(BATCH, GIVEN), places(BATCH), places(GIVEN)
    norms, batch_norms = (sum(slot >= 0 for slot in some) for some in slots[:2])
    return NormPlan(list(modes), *slots, norms, batch_norms, param_dtype, wide)
