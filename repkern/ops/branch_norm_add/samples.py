"""Inputs of the branch_norm_add ops for tests and benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repkern.ops._sample import Sample
from repkern.ops.branch_norm_add import reference
from repkern.ops.branch_norm_add.bounds import bounds_of
from repkern.ops.branch_norm_add.contract import ACTIVATIONS, AS_IS, BATCH, GIVEN, OP

__all__ = ["relu_samples", "samples"]

_MODES = {"b": BATCH, "g": GIVEN, "a": AS_IS}


@dataclass(frozen=True)
class _Case:
    """shape [N, C, H, W]; modes: a letter a branch; offset: |mean| / std of the maps; repeat: the last is the first."""

    shape: tuple[int, int, int, int]
    modes: str
    activation: str = "relu"
    channels_last: bool = False
    offset: float = 0.5
    repeat: bool = False
    slow: bool = False

    def __str__(self) -> str:
        size = "x".join(str(n) for n in self.shape)
        marks = f"{'_cl' if self.channels_last else ''}{'_repeat' if self.repeat else ''}"
        return f"{size}_{self.modes}_{self.activation}{marks}" + ("" if self.offset < 1 else f"_offset{self.offset:g}")


# The second is the small one of test_all_ops: no statistics that an op could not differentiate, no corner.
_CASES: tuple[_Case, ...] = (
    _Case((2, 1, 1, 1), "b", "none"),
    _Case((2, 3, 3, 5), "ba", "silu"),
    _Case((1, 1, 7, 11), "bb"),
    _Case((2, 5, 1, 1), "bbb", "hardswish"),
    _Case((1, 4, 13, 17), "bga"),
    _Case((3, 17, 5, 5), "bgab", "relu6", channels_last=True, repeat=True),
    _Case((2, 33, 4, 4), "bbbbbbbb", "silu"),
    _Case((5, 2, 3, 3), "aa"),
    _Case((1, 3, 1, 1), "gag", "silu"),
    _Case((3, 16, 7, 3), "baa", repeat=True, channels_last=True),
    _Case((2, 2, 8, 9), "bb", "none", offset=1000),
    _Case((2, 19, 8, 9), "bgb", offset=1000, channels_last=True),
    _Case((1, 1, 1, 37), "a", "hardswish"),
    _Case((2, 7, 6, 6), "g", "relu6"),
)
_SLOW = (
    _Case((2, 3, 61, 67), "bba", slow=True),
    _Case((4, 70, 19, 23), "bab", "silu", channels_last=True, slow=True),
    _Case((1, 1, 191, 193), "bb", offset=100, slow=True),
    _Case((16, 48, 16, 16), "bbb", slow=True),
)


def samples(op_name: str) -> list[Sample]:
    """Samples for one of the five ops of the stem."""
    generator = torch.Generator().manual_seed(23)
    cases = _CASES + _SLOW
    if "statistics" in op_name:
        cases = tuple(case for case in cases if set(case.modes) != {"a"} and case.shape[0] * case.shape[3] > 1)
    made = [_sample(op_name, case, generator) for case in cases]
    if op_name == "branch_norm_add_backward":
        made.append(_of_a_larger_batch(_Case((2, 5, 3, 4), "bga"), generator))
    return made


def relu_samples(
    name: str, grad: Tensor, maps: list[Tensor], weights: list[Tensor], biases: list[Tensor], *, eps: float
) -> tuple[Sample, Sample]:
    """Forward, and the backward that follows it, of the ReLU of a sum of batch norms, for tensors of the caller."""
    options = ([BATCH] * len(maps), [eps] * len(maps), ACTIVATIONS.index("relu"))
    mean, var = reference.branch_norm_statistics([y.double() for y in maps])
    forward: tuple[Any, ...] = (maps, weights, biases, [], [], *options)
    backward: tuple[Any, ...] = (grad, maps, weights, biases, [], [], mean, var, None, None, *options)
    return (
        Sample(name, forward, (), bounds=functools.partial(bounds_of, OP)),
        Sample(name, backward, (), bounds=functools.partial(bounds_of, f"{OP}_backward", computed_statistics=True)),
    )


def _sample(op_name: str, case: _Case, generator: torch.Generator) -> Sample:
    args = _MAKERS[op_name](case, _random(generator))
    bounds = functools.partial(bounds_of, op_name)
    return Sample(str(case), args, (), slow=case.slow, bounds=bounds)


def _random(generator: torch.Generator) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def _as_case(case: _Case, values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if case.channels_last else values


def _maps(case: _Case, random: Callable[..., Tensor]) -> list[Tensor]:
    c = case.shape[1]
    maps = [
        _as_case(case, (random(*case.shape) + case.offset * random(c, 1, 1)) * random(c, 1, 1).exp())
        for _ in case.modes
    ]
    return [*maps[:-1], maps[0]] if case.repeat else maps


def _forward(case: _Case, random: Callable[..., Tensor]) -> tuple[Any, ...]:
    c, branches = case.shape[1], _maps(case, random)
    modes = [_MODES[letter] for letter in case.modes]
    norms = [y for y, mode in zip(branches, modes, strict=True) if mode != AS_IS]
    given = [y for y, mode in zip(branches, modes, strict=True) if mode == GIVEN]
    weights, biases = ([random(c) for _ in norms] for _ in range(2))
    if weights:
        weights[0][c // 2] = 0  # as a block that starts without this branch
    # Statistics of about the maps' size, as running ones are.
    means = [y.mean((0, 2, 3)) + 0.1 * random(c) for y in given]
    variances = [(y.var((0, 2, 3), correction=0) + 0.1) * random(c).exp() for y in given]
    eps = [1e-5 * (1 + k) for k in range(len(norms))]
    return branches, weights, biases, means, variances, modes, eps, ACTIVATIONS.index(case.activation)


def _with_grad(case: _Case, random: Callable[..., Tensor]) -> tuple[Any, ...]:
    """grad, the tensors of the call with its batch statistics, the options."""
    *tensors, modes, eps, activation = _forward(case, random)
    mean, var = reference._batch_statistics(tensors[0], modes)
    return _as_case(case, random(*case.shape)), *tensors, mean, var, modes, eps, activation


def _backward(case: _Case, random: Callable[..., Tensor]) -> tuple[Any, ...]:
    args = _with_grad(case, random)
    return *args[:8], None, None, *args[8:]


def _of_a_larger_batch(case: _Case, generator: torch.Generator) -> Sample:
    """As one of three processes that synchronize their statistics."""
    random = _random(generator)
    args = _with_grad(case, random)
    sums = 3 * reference.branch_norm_sums(*args) + random(*(1 + len(args[2]), case.shape[1]))
    count = torch.tensor([3.0 * args[0].numel() / case.shape[1]], dtype=torch.float64)
    args = (*args[:8], sums, count, *args[8:])
    return Sample(f"{case}_larger", args, (), bounds=functools.partial(bounds_of, "branch_norm_add_backward"))


def _statistics(case: _Case, random: Callable[..., Tensor]) -> tuple[Any, ...]:
    maps = _maps(case, random)
    return (maps if len(maps) > 1 else [*maps, _as_case(case, random(*case.shape))],)


def _statistics_backward(case: _Case, random: Callable[..., Tensor]) -> tuple[Any, ...]:
    (maps,) = _statistics(case, random)
    mean, _ = reference.branch_norm_statistics(maps)
    return random(*mean.shape), random(*mean.shape), maps, mean


_MAKERS: dict[str, Callable[[_Case, Callable[..., Tensor]], tuple[Any, ...]]] = {
    "branch_norm_add": _forward,
    "branch_norm_add_backward": _backward,
    "branch_norm_statistics": _statistics,
    "branch_norm_statistics_backward": _statistics_backward,
    "branch_norm_sums": _with_grad,
}
