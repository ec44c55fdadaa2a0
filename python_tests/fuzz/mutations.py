"""Arguments that nobody should pass, and layouts of tensors that anybody may."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repkern.testing import noncontiguous

EXTREME = (
    0, 1, 2, 3, 5, 7, 64, -1, -2, -(2**31), -(2**63), 2**15, 2**16 + 1, 2**20, 2**24, 2**28, 2**30, 2**31 - 1, 2**31,
    2**32, 2**32 + 1, 2**33 + 1, 2**47, 2**61, 2**62, 2**62 + 1, 2**63 - 1, 2**63, 2**64, 10**30,
)  # fmt: skip
STRANGE = (None, True, False, "3", "", float("nan"), float("inf"), 1.5, [], [1], [None], {}, b"x", 1j, object)
NUMBERS = (
    float("nan"),
    float("inf"),
    -float("inf"),
    -1.0,
    -1e-30,
    1e308,
    0.0,
    1.0,
    2.0,
    5,
    None,
    "0.1",
    True,
    1j,
    [0.1],
)


def in_some_layout(rng: Any, tensor: Tensor) -> Tensor:
    """The same values in memory of another order, or not in memory at all."""
    kind = rng.randrange(12)
    if kind == 0:
        return noncontiguous(tensor)
    if kind == 1:
        return torch._neg_view(-tensor)
    if kind == 2 and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if kind == 3 and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 4:
        return torch._neg_view(noncontiguous(-tensor))
    return tensor


def _zeros(tensor: Tensor) -> Tensor:
    return torch._efficientzerotensor(tuple(tensor.shape), dtype=tensor.dtype)


def _huge(tensor: Tensor) -> Tensor:
    return tensor.new_ones(1).expand(*(2**40 if at == 0 else n for at, n in enumerate(tensor.shape)))


_TENSORS = (
    lambda t: None,
    lambda t: [1.0],
    lambda t: 1.0,
    lambda t: "tensor",
    lambda t: t.new_ones(()),
    lambda t: t.new_ones(1),
    lambda t: t.new_ones(0),
    lambda t: t[:0] if t.dim() else t,
    lambda t: t[..., :0] if t.dim() else t,
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.complex64).conj(),
    lambda t: torch.view_as_real(torch.complex(t.float(), t.float()).conj())[..., 1],
    lambda t: t.long(),
    lambda t: t.bool(),
    lambda t: t.half(),
    lambda t: t.bfloat16(),
    lambda t: t.float(),
    lambda t: t.double(),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten(),
    lambda t: torch.cat([t, t]) if t.dim() else t,
    lambda t: t[..., :-1] if t.dim() else t,
    lambda t: t.clone().requires_grad_(),
    lambda t: t.numpy(),
    lambda t: t * float("nan"),
    lambda t: t * 1e30,
    lambda t: t * 1e-42,
    _zeros,
    _huge,
)


def strange_in_place_of(rng: Any, value: Any) -> Any:
    """Something else than `value`, of the kinds that are given by mistake."""
    if rng.random() < 0.1:
        return rng.choice(STRANGE)
    if isinstance(value, Tensor):
        if value.numel() > 2**24:  # an expanded one, changed before
            return None
        change = rng.choice(_TENSORS)
        try:
            return change(value)
        except (RuntimeError, TypeError):  # not every form exists for every tensor
            return None
    if isinstance(value, bool):
        return rng.choice((not value, *STRANGE))
    if isinstance(value, int):
        return rng.choice(EXTREME)
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if isinstance(value, list | tuple):
        parts = list(value)
        return rng.choice((None, [], parts + parts, parts[:-1], parts[::-1], tuple(parts), *parts[:1]))
    if value is None:
        return rng.choice((torch.ones(3), *STRANGE))
    return rng.choice((*STRANGE, *EXTREME))


def mutated(rng: Any, tree: Any) -> Any:
    """`tree` (nested lists, tuples, named tuples, dicts) with one part replaced."""
    holder = [tree]
    paths = list(_paths(holder))
    path = rng.choice(paths[1:] if len(paths) > 1 else paths)
    return _replaced(holder, path, lambda value: strange_in_place_of(rng, value))[0]


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = list(enumerate(tree))
    else:
        return
    for key, value in items:
        yield (*path, key)
        yield from _paths(value, (*path, key))


def _replaced(tree: Any, path: tuple[Any, ...], change: Any) -> Any:
    if not path:
        return change(tree)
    if isinstance(tree, dict):
        return {k: _replaced(v, path[1:], change) if k == path[0] else v for k, v in tree.items()}
    parts = [_replaced(v, path[1:], change) if at == path[0] else v for at, v in enumerate(tree)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
