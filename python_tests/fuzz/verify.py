"""Every call of an op is compared with its reference in float64, within the computed bound."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from repkern import testing
from repkern.ops import OPS
from repkern.ops._check import in_memory
from repkern.ops._sample import Sample
from repkern.ops.branch_norm_add.bounds import bounds_of
from repkern.ops.direct_conv2d import reference as direct
from repkern.ops.direct_conv2d import samples as direct_samples
from repkern.ops.grad_mult_adamw import samples as adamw_samples
from repkern.ops.grad_mult_sgd import samples as sgd_samples
from repkern.ops.orepa_squeeze import samples as squeeze_samples
from repkern.ops.orepa_squeeze.layers import unpack
from repkern.ops.winograd_conv2d import samples as winograd_samples
from repkern.testing.inputs import map_tensors

_HALF = (torch.float16, torch.bfloat16)
# No statement about larger numbers: their squares and sums may not be finite in float32.
_OVERFLOWS = 1e15
_RATES = {"grad_mult_sgd_": 6, "grad_mult_adamw_": 9}  # where the learning rates are


def _squeeze_sample(name: str, args: Any) -> Sample:
    if name == "orepa_squeeze_many":
        return squeeze_samples._forward(name, unpack(args[0], args[1]), args[2], args[3])
    made = squeeze_samples._backward(name, unpack(args[1], args[2]))
    return Sample(name, args, made.lengths)


def _compose_sample(name: str, args: Any) -> Sample:
    *_, first, second, groups = args
    k1, k2 = first.shape[-1], second.shape[-1]
    if name == "compose_sequential":
        return Sample(name, args, (second.shape[1] * min(k1, k2) ** 2,))
    return Sample(name, args, (second.shape[0] // groups * k2 * k2, first.shape[1] * k1 * k1))


_BOUNDS: dict[str, Callable[..., list[Tensor]]] = {
    "direct_conv2d_packed": direct_samples.conv_bounds,
    "direct_pack_weight": direct_samples._exact,
    "winograd_conv2d_packed": winograd_samples._conv_bounds,
    "winograd_stride2_conv2d_packed": winograd_samples._stride2_bounds,
    "winograd_transform_weight": winograd_samples._weight_bounds,
    "grad_mult_sgd_": sgd_samples._bounds,
    "grad_mult_adamw_": adamw_samples._bounds,
}


def sample_of(name: str, args: tuple[Any, ...]) -> Sample:
    """A call of op `name` with float64 arguments as a sample, which knows its bounds."""
    if name.startswith("orepa_squeeze"):
        return _squeeze_sample(name, args)
    if name.startswith("compose_sequential"):
        return _compose_sample(name, args)
    if name.startswith("branch_norm"):
        return Sample(name, args, (), bounds=functools.partial(bounds_of, name))
    if name in _RATES:  # magnitudes are of the absolute rate
        at = _RATES[name]
        args = (*args[:at], [abs(rate) for rate in args[at]], *args[at + 1 :])
    return Sample(name, args, (), bounds=_BOUNDS[name])


def _exact_arguments(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """In float64; weights in three parts as the weights that they are."""
    if name == "direct_conv2d_packed" and args[1].dtype is torch.bfloat16:
        x, packed, bias, residual, out_channels, kernel, *rest = args
        weight = direct.unpack(packed, out_channels, x.shape[1] // rest[3], kernel, rest[3])
        args = (x, direct.direct_pack_weight(weight, rest[3], 0), bias, residual, out_channels, kernel, *rest)
    return map_tensors(args, lambda t: testing.as_float(in_memory(t.detach())).clone())


def _flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [] if outputs is None else list(outputs)


def check_call(name: str, before: tuple[Any, ...], outputs: list[Tensor]) -> None:
    """AssertionError where outputs of a call with arguments `before` are further off than the bound."""
    op, args = OPS[name], _exact_arguments(name, before)
    numbers = [value for arg in args for value in (arg if isinstance(arg, list) else [arg]) if type(value) is float]
    if any(abs(value) > _OVERFLOWS for value in numbers):
        return
    if any(not bool((t.abs() < _OVERFLOWS).all()) for t in _tensors(args)):
        return  # bounds are of numbers that do not overflow
    dtypes = {t.dtype for t in _tensors(before) if t.is_floating_point()}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    dtype = torch.float32 if coarsest in _HALF and not name.startswith("branch_norm") else coarsest
    if name == "direct_pack_weight" and before[2] == 1:
        return  # three bfloat16 parts: what they add up to is checked where they are used
    try:
        bounds = testing.error_bounds(op, sample_of(name, args), dtype)
    except AssertionError:  # the bounds of AdamW's step say that they do not hold where it divides by almost 0
        if name != "grad_mult_adamw_":
            raise
        return
    if name == "orepa_squeeze_many":
        args = (*args[:2], None, args[3])  # the bound has one rounding to the output's dtype, not two
    if op.mutates:
        op.implementation("reference")(*args)
        wanted = changed(op, args)
    else:
        wanted = _flat(op.implementation("reference")(*args))
    if not all(bool((t.abs() < _OVERFLOWS).all()) for t in wanted):
        return
    assert len(outputs) == len(wanted) == len(bounds), f"{name}: {len(outputs)} outputs"
    for number, (got, exact, bound) in enumerate(zip(outputs, wanted, bounds, strict=True)):
        if got.dtype in _HALF:  # what lies below its normal numbers is rounded to a multiple of the smallest
            bound = bound + torch.finfo(got.dtype).tiny * torch.finfo(got.dtype).eps
        if got.dtype in _HALF and not name.startswith(("branch_norm", "orepa")):
            bound = bound + (exact.abs() + bound) * testing.unit_roundoff(got.dtype)
        testing.assert_close(got, exact, bound, f"{name}, output {number}")


def changed(op: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that an optimizer step changed, in the order of its bounds; step counts are not rounded."""
    names = [a.name for a in op.overload._schema.arguments]
    idle = {"steps"}
    if "amsgrad" in names and not args[names.index("amsgrad")]:
        idle |= {name for name in names if name.startswith("max_")}  # given, and neither read nor written
    return [t for at in op.mutates if names[at] not in idle for t in args[at]]


def _tensors(args: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(args, lambda t: found.append(t) or t)
    return found


class Recorder(TorchDispatchMode):
    """Compares all calls of our ops below it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("repkern::")
        if name not in OPS:
            return func(*args, **(kwargs or {}))
        op = OPS[name]
        before = map_tensors(tuple(args), lambda t: t.clone()) if op.mutates else tuple(args)
        outputs = func(*args)
        if not any(t.device.type == "meta" for t in _tensors(before)):
            self.calls += 1
            check_call(name, before, changed(op, tuple(args)) if op.mutates else _flat(outputs))
        return outputs
