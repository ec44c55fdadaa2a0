"""What grad_mult_sgd_ and grad_mult_adamw_ share: the multiplier, the checks, and the plan worked out from shapes.

Math: docs/ops/grad_mult_sgd.md.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repkern.ops._library import Op

__all__ = [
    "CENTRE",
    "DENSE",
    "NONE",
    "SCALE",
    "ChannelMultiplier",
    "Multiplier",
    "Packed",
    "Plan",
    "TensorPlan",
    "check_number",
    "check_numbers",
    "check_steps",
    "dense_multipliers",
    "keep_where",
    "multiplied_gradient",
    "pack_multipliers",
    "per_tensor",
    "plan_for",
    "require_flag",
    "run_in_place",
    "state_dtype",
]

NONE, SCALE, CENTRE, DENSE = range(4)  # GradMultKind in csrc/common/grad_mult.h
_TENSORS = {NONE: 0, SCALE: 1, CENTRE: 2, DENSE: 1}  # how many tensors a multiplier of that kind takes
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LONGEST_ROW = 2**30  # kernels count inside a row with 32 bits


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state and of multipliers for parameters of `dtype`, and of the arithmetic."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class ChannelMultiplier:
    """Grad Mult of a convolution weight [Co, Ci/g, Kh, Kw] from one or two numbers a channel (arXiv 2205.15242, Eq. 7).

        M[o, i, h, w] = scale[o] + centre[o] [(h, w) is the centre] + identity [centre and i == o mod (Co/g)]

    The numbers are final: for SGD the squared scales of the constant-scale branches, for AdamW their absolute values.

    scale: [Co], finite, on the parameter's device; float64 for float64 parameters, else float32.
    centre: None or like `scale`. What a 1x1 branch adds; of an even kernel size there is no centre.
    identity: what an identity branch adds, 1.0 where there is one; it needs Ci == Co.
    groups: g of the convolution.

    Raises TypeError or ValueError when `scale` and `centre` are no finite vectors of one length, dtype and device.
    """

    scale: Tensor
    centre: Tensor | None = None
    identity: float = 0.0
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("scale", "centre"):
            vector = getattr(self, name)
            if vector is not None:
                _check_vector(name, vector)
        if self.centre is not None:
            for what in ("shape", "dtype", "device"):
                ours, theirs = getattr(self.centre, what), getattr(self.scale, what)
                if ours != theirs:
                    raise ValueError(f"ChannelMultiplier: `centre` has {what} {ours} but `scale` has {theirs}")
        if not math.isfinite(self.identity):
            raise ValueError(f"ChannelMultiplier: `identity` must be finite, got {self.identity}")
        if self.groups < 1 or self.scale.shape[0] % self.groups:
            raise ValueError(
                f"ChannelMultiplier: `groups` must divide the {self.scale.shape[0]} channels of `scale`, "
                f"got {self.groups}"
            )

    def dense(self, shape: Sequence[int]) -> Tensor:
        """M for a weight of this shape, [Co, Ci/g, Kh, Kw]; ValueError when it does not fit."""
        _check_kernel("ChannelMultiplier", "shape", tuple(shape), self.kind, self.groups, self.identity)
        if shape[0] != self.scale.shape[0]:
            raise ValueError(f"ChannelMultiplier: {self.scale.shape[0]} channels, but the weight is {tuple(shape)}")
        return _dense(self.scale, self.centre, self.identity, self.groups, shape)

    @property
    def kind(self) -> int:
        """CENTRE when something is added at the centre, else SCALE."""
        return SCALE if self.centre is None and not self.identity else CENTRE


Multiplier = ChannelMultiplier | Tensor | None


def _check_vector(name: str, vector: Any) -> None:
    if not isinstance(vector, Tensor) or vector.dtype not in (torch.float32, torch.float64):
        got = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
        raise TypeError(f"ChannelMultiplier: `{name}` must be a float32 or float64 tensor, got {got}")
    if vector.dim() != 1 or vector.shape[0] < 1:
        raise ValueError(f"ChannelMultiplier: `{name}` must be [Co] with Co >= 1, got {tuple(vector.shape)}")
    if vector.device.type != "meta" and not bool(vector.isfinite().all()):
        at = int((~vector.isfinite()).nonzero()[0])
        raise ValueError(f"ChannelMultiplier: `{name}` must be finite, got {vector[at].item()} at channel {at}")


def _check_kernel(op: str, name: str, shape: tuple[int, ...], kind: int, groups: int, identity: float) -> None:
    if len(shape) != 4:
        raise ValueError(f"{op}: a ChannelMultiplier needs a [Co, Ci/g, Kh, Kw] weight, got `{name}` {shape}")
    if kind == CENTRE and (shape[2] % 2 == 0 or shape[3] % 2 == 0):
        raise ValueError(f"{op}: a kernel with a centre needs odd sizes, got `{name}` {shape}")
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"{op}: `groups` must divide the {shape[0]} output channels of `{name}`, got {groups}")
    if identity and shape[1] * groups != shape[0]:
        raise ValueError(
            f"{op}: an identity needs as many input as output channels, got {shape[1]} x {groups} groups = "
            f"{shape[1] * groups} and {shape[0]} of `{name}`"
        )


def _dense(scale: Tensor, centre: Tensor | None, identity: float, groups: int, shape: Sequence[int]) -> Tensor:
    co, cig, kh, kw = shape
    multiplier = scale.reshape(-1, 1, 1, 1).expand(co, cig, kh, kw).clone()
    middle = multiplier[:, :, kh // 2, kw // 2]
    if centre is not None:
        middle += centre[:, None]
    if identity:
        out = torch.arange(co, device=scale.device)
        middle[out, out % (co // groups)] += identity
    return multiplier


class Packed(NamedTuple):
    """Multipliers as the torch op takes them: all tensors in order, (kind, groups) and the identity per parameter."""

    tensors: list[Tensor]
    layout: list[int]
    identity: list[float]


def pack_multipliers(op: str, count: int, multipliers: Sequence[Multiplier] | None) -> Packed:
    """`multipliers` as arguments of a torch op; None stands for none anywhere."""
    if multipliers is None:
        return Packed([], [NONE, 1] * count, [0.0] * count)
    if len(multipliers) != count:
        raise ValueError(f"{op}: {count} parameters, but {len(multipliers)} multipliers")
    tensors: list[Tensor] = []
    layout: list[int] = []
    identity: list[float] = []
    for multiplier in multipliers:
        if multiplier is None:
            layout += (NONE, 1)
            identity.append(0.0)
        elif isinstance(multiplier, ChannelMultiplier):
            scale, centre = multiplier.scale, multiplier.centre
            kind = SCALE if centre is None and not multiplier.identity else CENTRE
            tensors.append(scale)
            if kind == CENTRE:
                tensors.append(torch.zeros_like(scale) if centre is None else centre)
            layout += (kind, multiplier.groups)
            identity.append(multiplier.identity)
        elif isinstance(multiplier, Tensor):
            tensors.append(multiplier)
            layout += (DENSE, 1)
            identity.append(0.0)
        else:
            raise TypeError(
                f"{op}: a multiplier is None, a ChannelMultiplier or a tensor, got {type(multiplier).__name__}"
            )
    return Packed(tensors, layout, identity)


def per_tensor(op: str, name: str, value: float | Sequence[float], count: int) -> list[float]:
    """One float per parameter from a float or a sequence."""
    if isinstance(value, int | float):
        return [float(value)] * count
    values = list(value)
    if len(values) != count:
        raise ValueError(f"{op}: {count} parameters, but {len(values)} values of `{name}`")
    return values


def dense_multipliers(shapes: Sequence[Sequence[int]], packed: Packed) -> list[Tensor | None]:
    """M of every parameter, for the reference."""
    waiting = iter(packed.tensors)
    answer: list[Tensor | None] = []
    for shape, kind, groups, identity in zip(
        shapes, packed.layout[::2], packed.layout[1::2], packed.identity, strict=True
    ):
        tensors = [next(waiting) for _ in range(_TENSORS[kind])]
        if kind in (NONE, DENSE):
            answer.append(tensors[0] if tensors else None)
        else:
            answer.append(_dense(tensors[0], tensors[1] if kind == CENTRE else None, identity, groups, shape))
    return answer


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


_size, _stride = Tensor.size, Tensor.stride
_dtype_of, _device_of = operator.attrgetter("dtype"), operator.attrgetter("device")


def _facts(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return (
        tuple(map(_size, tensors)),
        tuple(map(_stride, tensors)),
        tuple(map(_dtype_of, tensors)),
        tuple(map(_device_of, tensors)),
    )


def plan_for(op: str, names: tuple[str, ...], lists: Sequence[Sequence[Tensor]], packed: Packed) -> Plan:
    """Checks all tensors against each other and plans them; `lists` are params, grads and each kind of state.

    Raises TypeError or ValueError naming the list, the index, the got and the wanted value. The same shapes are
    checked once: the answer is kept.
    """
    params = lists[0]
    _refuse_twice(op, "params", params)
    for name, tensors in zip(names, lists, strict=True):
        if len(tensors) != len(params):
            raise ValueError(f"{op}: {len(params)} parameters, but {len(tensors)} `{name}`")
        for at, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{op}: `{name}[{at}]` must be a tensor, got {type(tensor).__name__}")
            if tensor.layout is not torch.strided:
                raise TypeError(f"{op}: `{name}[{at}]` must be dense, got layout {tensor.layout}; no sparse gradients")
    facts = tuple(_facts(tensors) for tensors in lists)
    key = (op, names, facts, _facts(packed.tensors), tuple(packed.layout), tuple(packed.identity))
    try:
        return _plan(*key)
    except TypeError as error:
        if "unhashable" not in str(error):  # symbolic sizes
            raise
        return _plan.__wrapped__(*key)


def _refuse_twice(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    if len(set(map(id, tensors))) != len(tensors):
        at = next(i for i, t in enumerate(tensors) if any(t is earlier for earlier in tensors[:i]))
        raise ValueError(f"{op}: `{name}[{at}]` is in the list twice")


@functools.lru_cache(maxsize=256)
def _plan(
    op: str,
    names: tuple[str, ...],
    facts: tuple[Any, ...],
    multiplier_facts: tuple[Any, ...],
    layout: tuple[int, ...],
    identity: tuple[float, ...],
) -> Plan:
    (shapes, strides, dtypes, devices), *others = facts
    count = len(shapes)
    if len(layout) != 2 * count or len(identity) != count:
        raise ValueError(f"{op}: {count} parameters, but multipliers for {len(layout) // 2} and {len(identity)}")
    slots = [0]
    for kind in layout[::2]:
        if kind not in _TENSORS:
            raise ValueError(f"{op}: a multiplier's kind is one of {tuple(_TENSORS)}, got {kind}")
        slots.append(slots[-1] + _TENSORS[kind])
    if slots[-1] != len(multiplier_facts[0]):
        raise ValueError(f"{op}: {slots[-1]} multiplier tensors are needed, got {len(multiplier_facts[0])}")
    tensors = []
    for at in range(count):
        where = f"params[{at}]"
        if dtypes[at] not in _DTYPES:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            got = str(dtypes[at]).removeprefix("torch.")
            raise TypeError(f"{op}: `{where}` must be one of {wanted}, got {got}")
        if devices[at] != devices[0]:
            raise ValueError(f"{op}: `{where}` is on {devices[at]} but `params[0]` is on {devices[0]}")
        for name, (others_shape, _, others_dtype, others_device) in zip(names[1:], others, strict=True):
            wanted_dtype = dtypes[at] if name == "grads" else state_dtype(dtypes[at])
            wanted_fact = (shapes[at], wanted_dtype, devices[at])
            _require(op, f"{name}[{at}]", (others_shape[at], others_dtype[at], others_device[at]), wanted_fact)
        kind, groups = layout[2 * at], layout[2 * at + 1]
        if kind in (SCALE, CENTRE):
            _check_kernel(op, where, tuple(shapes[at]), kind, groups, identity[at])
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
    return Plan(tuple(tensors), devices[0], tuple(reordered))


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


def check_number(op: str, name: str, value: float) -> None:
    """ValueError unless `value` is finite."""
    if not math.isfinite(value):
        raise ValueError(f"{op}: `{name}` must be finite, got {value}")


def check_numbers(op: str, count: int, **numbers: Sequence[float]) -> None:
    """ValueError unless every number is finite and there is one per parameter."""
    for name, values in numbers.items():
        if len(values) != count:
            raise ValueError(f"{op}: {count} parameters, but {len(values)} values of `{name}`")
        if not all(map(math.isfinite, values)):
            at = next(i for i, value in enumerate(values) if not math.isfinite(value))
            raise ValueError(f"{op}: `{name}` must be finite, got {values[at]} for `params[{at}]`")


def require_flag(op: str, name: str, flag: Tensor | None, device: torch.device) -> None:
    """TypeError or ValueError unless `flag` is None or one float32 on `device`."""
    if flag is None:
        return
    if flag.dtype is not torch.float32:
        raise TypeError(f"{op}: `{name}` must be float32, got {flag.dtype}")
    if flag.numel() != 1:
        raise ValueError(f"{op}: `{name}` must have one element, got shape {tuple(flag.shape)}")
    if flag.device != device:
        raise ValueError(f"{op}: `{name}` is on {flag.device} but the parameters are on {device}")


def multiplied_gradient(grad: Tensor, multiplier: Tensor | None, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    """M * grad / grad_scale, negative when `maximize`, in the dtype of the state."""
    g = grad.to(state_dtype(grad.dtype))
    if grad_scale is not None:
        g = g / grad_scale.reshape(()).to(g.dtype)
    if multiplier is not None:
        g = g * multiplier
    return -g if maximize else g


def keep_where(found_inf: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """`new`, or `old` where an infinity was found."""
    return new if found_inf is None else torch.where(found_inf.reshape(()) != 0, old, new)


def run_in_place(op: Op, *args: Any) -> None:
    """Call `op`; past the dispatcher where nobody watches, as converting hundreds of tensors there takes longer."""
    if torch.compiler.is_compiling():
        op(*args)
    else:
        op.call_from_autograd(*args)


def check_steps(op: str, steps: Sequence[Tensor], count: int, device: torch.device) -> None:
    """TypeError or ValueError unless `steps` are `count` different float32 numbers on `device`."""
    if len(steps) != count:
        raise ValueError(f"{op}: {count} parameters, but {len(steps)} `steps`")
    _refuse_twice(op, "steps", steps)
    for at, step in enumerate(steps):
        require_flag(op, f"steps[{at}]", step, device)
