"""What grad_mult_sgd_ and grad_mult_adamw_ share: the multiplier, checks of numbers, and lines of the reference.

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

from repkern.ops import _check
from repkern.ops._library import Op

__all__ = [
    "CENTRE",
    "CPU",
    "DENSE",
    "NONE",
    "SCALE",
    "TENSORS",
    "ChannelMultiplier",
    "Multiplier",
    "Packed",
    "Vectors",
    "changed_tensors",
    "check_kernel",
    "check_number",
    "check_numbers",
    "check_steps",
    "dense_multipliers",
    "facts_of",
    "keep_where",
    "multiplied_gradient",
    "pack_multipliers",
    "per_tensor",
    "refuse_twice",
    "require_flag",
    "run_in_place",
    "state_dtype",
]

NONE, SCALE, CENTRE, DENSE = range(4)  # GradMultKind in csrc/common/grad_mult.h
TENSORS = {NONE: 0, SCALE: 1, CENTRE: 2, DENSE: 1}  # how many tensors a multiplier of that kind takes


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
        _check.require_number("ChannelMultiplier", "identity", self.identity)
        _check.require_integer("ChannelMultiplier", "groups", self.groups)
        if self.groups < 1 or self.scale.shape[0] % self.groups:
            raise ValueError(
                f"ChannelMultiplier: `groups` must divide the {self.scale.shape[0]} channels of `scale`, "
                f"got {self.groups}"
            )

    def dense(self, shape: Sequence[int]) -> Tensor:
        """M for a weight of this shape, [Co, Ci/g, Kh, Kw]; ValueError when it does not fit."""
        check_kernel("ChannelMultiplier", "shape", tuple(shape), self.kind, self.groups, self.identity)
        if shape[0] != self.scale.shape[0]:
            raise ValueError(f"ChannelMultiplier: {self.scale.shape[0]} channels, but the weight is {tuple(shape)}")
        return _dense(self.scale, self.centre, self.identity, self.groups, shape)

    @property
    def kind(self) -> int:
        """CENTRE when something is added at the centre, else SCALE."""
        return SCALE if self.centre is None and not self.identity else CENTRE


Multiplier = ChannelMultiplier | Tensor | None
_CHANNELS_ONLY = {ChannelMultiplier, type(None)}


def _check_vector(name: str, vector: Any) -> None:
    if not isinstance(vector, Tensor) or vector.dtype not in (torch.float32, torch.float64):
        got = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
        raise TypeError(f"ChannelMultiplier: `{name}` must be a float32 or float64 tensor, got {got}")
    if vector.layout is not torch.strided:
        raise TypeError(f"ChannelMultiplier: `{name}` must be a dense tensor, got layout {vector.layout}")
    if vector.dim() != 1 or vector.shape[0] < 1:
        raise ValueError(f"ChannelMultiplier: `{name}` must be [Co] with Co >= 1, got {tuple(vector.shape)}")
    if vector.device.type != "meta" and not bool(vector.isfinite().all()):
        at = int((~vector.isfinite()).nonzero()[0])
        raise ValueError(f"ChannelMultiplier: `{name}` must be finite, got {vector[at].item()} at channel {at}")


def check_kernel(op: str, name: str, shape: tuple[int, ...], kind: int, groups: int, identity: float) -> None:
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


_dtype_of, _device_of, _is_cpu = (operator.attrgetter(name) for name in ("dtype", "device", "is_cpu"))
CPU = torch.device("cpu")


def facts_of(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Shapes, strides (None: all contiguous), dtypes and devices (one: all on the CPU): what is cheapest to ask for.

    RuntimeError for sparse tensors, of which none is contiguous.
    """
    contiguous, on_cpu = all(map(Tensor.is_contiguous, tensors)), all(map(_is_cpu, tensors))
    if not contiguous and any(tensor.layout is not torch.strided for tensor in tensors):
        raise RuntimeError("sparse tensors have no strides")
    return (
        tuple(map(Tensor.size, tensors)),
        None if contiguous else tuple(map(Tensor.stride, tensors)),
        tuple(map(_dtype_of, tensors)),
        CPU if on_cpu else tuple(map(_device_of, tensors)),
    )


class Vectors(list):  # of tensors
    """The vectors of ChannelMultipliers, which cannot change, and what was found about them."""

    facts: tuple[Any, ...]
    addresses: list[int] | None = None  # columns of the table


def pack_multipliers(op: str, count: int, multipliers: Sequence[Multiplier] | None) -> Packed:
    """`multipliers` as arguments of a torch op; None stands for none anywhere."""
    if multipliers is None:
        return Packed([], [NONE, 1] * count, [0.0] * count)
    if isinstance(multipliers, Tensor | ChannelMultiplier) or not isinstance(multipliers, Sequence):
        raise TypeError(f"{op}: `multipliers` must be a list, one a parameter, got {type(multipliers).__name__}")
    if len(multipliers) != count:
        raise ValueError(f"{op}: {count} parameters, but {len(multipliers)} multipliers")
    if torch.compiler.is_compiling() or not _CHANNELS_ONLY.issuperset(map(type, multipliers)):
        return _pack(op, multipliers)
    return _pack_channels(op, *multipliers)


@functools.lru_cache(maxsize=16)
def _pack_channels(op: str, *multipliers: Multiplier) -> Packed:
    """Kept, since an optimizer hands over the same objects in every step; ChannelMultiplier is hashed by identity."""
    packed = _pack(op, multipliers)
    vectors = Vectors(packed.tensors)
    vectors.facts = facts_of(vectors)
    return packed._replace(tensors=vectors)


def _pack(op: str, multipliers: Sequence[Multiplier]) -> Packed:
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
    if not isinstance(value, list | tuple):
        if isinstance(value, float) and not math.isfinite(value):
            return [value] * count  # for the check to name
        return [_check.require_number(op, name, value)] * count
    if len(value) != count:
        raise ValueError(f"{op}: {count} parameters, but {len(value)} values of `{name}`")
    if set(map(type, value)) == {float}:
        return list(value)
    return [_check.require_number(op, f"{name}[{at}]", number) for at, number in enumerate(value)]


def dense_multipliers(shapes: Sequence[Sequence[int]], packed: Packed) -> list[Tensor | None]:
    """M of every parameter, for the reference."""
    waiting = iter(packed.tensors)
    answer: list[Tensor | None] = []
    for shape, kind, groups, identity in zip(
        shapes, packed.layout[::2], packed.layout[1::2], packed.identity, strict=True
    ):
        tensors = [next(waiting) for _ in range(TENSORS[kind])]
        if kind in (NONE, DENSE):
            answer.append(tensors[0] if tensors else None)
        else:
            answer.append(_dense(tensors[0], tensors[1] if kind == CENTRE else None, identity, groups, shape))
    return answer


def refuse_twice(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    if len(set(map(id, tensors))) != len(tensors):
        at = next(i for i, t in enumerate(tensors) if any(t is earlier for earlier in tensors[:i]))
        raise ValueError(f"{op}: `{name}[{at}]` is in the list twice")


def changed_tensors(lists: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """What a step changes, by name; `lists`: params, grads, then each kind of state."""
    kinds = ("params", *(f"state[{at}]" for at in range(len(lists) - 2)))
    changed = (lists[0], *lists[2:])
    return {f"{kind}[{at}]": t for kind, own in zip(kinds, changed, strict=True) for at, t in enumerate(own)}


def check_number(op: str, name: str, value: float, least: float | None = None, below: float | None = None) -> None:
    """TypeError or ValueError unless `value` is a finite number, at least `least` and below `below`."""
    _check.require_number(op, name, value, least, below)


def check_numbers(op: str, count: int, **numbers: Sequence[float]) -> None:
    """ValueError unless every number is finite and there is one per parameter. Decay is not negative.

    A learning rate may be: schedules end a rounding error below 0, and a step there should not raise.
    """
    for name, values in numbers.items():
        if len(values) != count:
            raise ValueError(f"{op}: {count} parameters, but {len(values)} values of `{name}`")
        if not all(map(math.isfinite, values)):
            at = next(i for i, value in enumerate(values) if not math.isfinite(value))
            raise ValueError(f"{op}: `{name}` must be finite, got {values[at]} for `params[{at}]`")
        if name == "weight_decay" and values and min(values) < 0:
            at = min(range(count), key=values.__getitem__)
            raise ValueError(f"{op}: `{name}` must be at least 0, got {values[at]} for `params[{at}]`")


def require_flag(op: str, name: str, flag: Tensor | None, device: torch.device) -> None:
    """TypeError or ValueError unless `flag` is None or one float32 on `device`."""
    if flag is None:
        return
    _check.require_tensor(op, name, flag)
    if flag.layout is not torch.strided:
        raise TypeError(f"{op}: `{name}` must be a dense tensor, got layout {flag.layout}")
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
    refuse_twice(op, "steps", steps)
    for at, step in enumerate(steps):
        require_flag(op, f"steps[{at}]", step, device)
