"""Arguments that fit together, for every op of the table and every public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repkern import ops
from repkern.ops import OPS, Norm
from repkern.ops._grad_mult_samples import Spec, cast
from repkern.ops.branch_norm_add import samples as norm_samples
from repkern.ops.branch_norm_add.contract import ACTIVATIONS
from repkern.ops.compose_sequential import samples as compose_samples
from repkern.ops.direct_conv2d import samples as direct_samples
from repkern.ops.grad_mult_adamw import samples as adamw_samples
from repkern.ops.grad_mult_sgd import samples as sgd_samples
from repkern.ops.orepa_squeeze import samples as squeeze_samples
from repkern.ops.winograd_conv2d import samples as winograd_samples
from repkern.testing.inputs import map_tensors

_SINGLE = (torch.float32, torch.float32, torch.float64)
_SIZES = (1, 1, 1, 2, 2, 3, 3, 4, 5, 5, 7, 8, 9, 15, 16, 17)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _generator(rng: Any) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(40))


def _cast(rng: Any, args: Any) -> Any:
    dtype = rng.choice(_SINGLE)
    return map_tensors(args, lambda t: t.to(dtype))


def _channels(rng: Any) -> tuple[int, int, int]:
    """(inputs, outputs, groups)."""
    if rng.random() < 0.2:
        channels = rng.choice(_SIZES)
        return channels, channels * rng.choice((1, 1, 2)), channels
    groups = rng.choice((1, 1, 1, 2, 3))
    return rng.choice(_SIZES[: -4 * (groups > 1) or None]) * groups, rng.choice(_SIZES) * groups, groups


_BRANCHES = ("origin", "avg", "prior", "pointwise", "expand", "project")


def _layer(rng: Any) -> Any:
    ci, co, groups = _channels(rng)
    without = [name for name in _BRANCHES[1:] if rng.random() < 0.3]
    return squeeze_samples.random_layer(
        ci, co, rng.choice((1, 3, 3, 5)), groups=groups, cm=groups * rng.choice((1, 2, 5)),
        expansion=rng.choice((1, 2, 3)), without=without, scale=rng.choice(("vector", "compact", "none")),
        identity_reduce=rng.random() < 0.5, generator=_generator(rng),
    )  # fmt: skip


def _squeeze(rng: Any, backward: bool) -> Any:
    layers = [_layer(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    if backward:
        return _cast(rng, squeeze_samples._backward("fuzz", layers).args)
    out_dtype = rng.choice((None, None, torch.float32, torch.float64, torch.bfloat16, torch.float16))
    return _cast(rng, squeeze_samples._forward("fuzz", layers, out_dtype, rng.random() < 0.5).args)


def _compose_case(rng: Any) -> tuple[int, ...]:
    ci, cm, groups = _channels(rng)
    return ci, cm, groups * rng.choice(_SIZES[:8]), groups, rng.choice((1, 2, 3, 5)), rng.choice((1, 3, 4))


def _compose(rng: Any, name: str) -> Any:
    return _cast(rng, compose_samples._sample(name, _compose_case(rng), _generator(rng), slow=False).args)


def _direct_case(rng: Any) -> Any:
    c, k, groups = _channels(rng)
    while True:
        pair = [(rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3))) for _ in range(2)]
        made = direct_samples._Case(
            rng.choice((1, 1, 2, 3)), c, k, rng.choice(_SIZES), rng.choice(_SIZES),
            kernel=(rng.choice((1, 2, 3, 5)), rng.choice((1, 3, 3, 4))), stride=pair[0],
            padding=(rng.choice((0, 1, 2, 4)), rng.choice((0, 1, 3))), dilation=pair[1], groups=groups,
            activation=rng.choice(ACTIVATIONS), bias=rng.random() < 0.7, residual=rng.random() < 0.4,
            channels_last=rng.random() < 0.5,
        )  # fmt: skip
        sizes = zip((made.h, made.w), made.padding, made.dilation, made.kernel, strict=True)
        if all(n + 2 * p - d * (r - 1) >= 1 for n, p, d, r in sizes):
            return made


def _winograd_case(rng: Any, kernels: bool) -> Any:
    c, k, groups = _channels(rng)
    return winograd_samples._Case(
        rng.choice((1, 1, 2, 5)), c, k, rng.choice(_SIZES) + 2, rng.choice(_SIZES) + 2, tile=rng.choice((2, 4, 5, 6)),
        padding=rng.choice((0, 1, 1, 2)), groups=groups, activation=rng.choice(ACTIVATIONS), bias=rng.random() < 0.7,
        residual=rng.random() < 0.4, channels_last=rng.random() < 0.5, kernels=kernels,
    )  # fmt: skip


def _norm(rng: Any, name: str) -> Any:
    while True:
        modes = "".join(rng.choice("bbga") for _ in range(rng.choice((1, 2, 3, 3, 5))))
        shape = (rng.choice((1, 2, 3)), rng.choice(_SIZES), rng.choice(_SIZES[:9]), rng.choice(_SIZES[:9]))
        if shape[0] * shape[2] * shape[3] > 1:
            break
    made = norm_samples._Case(
        shape, "b" * len(modes) if "statistics" in name else modes, rng.choice(ACTIVATIONS), rng.random() < 0.5,
        rng.choice((0.5, 0.5, 100)), rng.random() < 0.1,
    )  # fmt: skip
    return _cast(rng, norm_samples._sample(name, made, _generator(rng)).args)


def _specs(rng: Any) -> tuple[Spec, ...]:
    found = []
    for _ in range(rng.choice((1, 2, 4))):
        co = rng.choice(_SIZES)
        kind = rng.choice((0, 1, 2, 3))
        if kind in (1, 2):
            k = rng.choice((1, 3))
            found.append(Spec((co, co, k, k), kind, float(kind == 2 and rng.random() < 0.5), 1, rng.random() < 0.4))
        else:
            found.append(Spec(rng.choice(((co,), (co, 3), (), (co, 2, 3, 3))), kind))
    return tuple(found)


def _sgd(rng: Any) -> Any:
    momentum = rng.choice((0.0, 0.9))
    nesterov = momentum > 0 and rng.random() < 0.4
    numbers = (rng.choice((0.0, 0.01)), momentum, 0.0 if nesterov else rng.choice((0.0, 0.3)), nesterov)
    flags = (rng.random() < 0.3, rng.random() < 0.3, rng.choice((None, 3.0)), rng.choice((None, 0.0, 1.0)))
    sample = sgd_samples._sample("fuzz", (_specs(rng), *numbers, *flags), _generator(rng))
    return cast(sample.args, rng.choice(_SINGLE))


def _adamw(rng: Any) -> Any:
    flags = [rng.random() < 0.4 for _ in range(4)]
    scales = (rng.choice((None, 3.0)), rng.choice((None, 0.0, 1.0)))
    sample = adamw_samples._sample("fuzz", (_specs(rng), rng.choice((0.0, 0.01)), *flags, *scales), _generator(rng))
    return cast(sample.args, rng.choice(_SINGLE))


FLAT: dict[str, Any] = {
    "orepa_squeeze_many": lambda rng: _squeeze(rng, False),
    "orepa_squeeze_many_backward": lambda rng: _squeeze(rng, True),
    "compose_sequential": lambda rng: _compose(rng, "compose_sequential"),
    "compose_sequential_backward": lambda rng: _compose(rng, "compose_sequential_backward"),
    "direct_conv2d_packed": lambda rng: _cast(rng, direct_samples._conv(_direct_case(rng), _random).args),
    "direct_pack_weight": lambda rng: _cast(rng, direct_samples._weight(_direct_case(rng), _random).args),
    "winograd_conv2d_packed": lambda rng: _cast(
        rng, winograd_samples._conv(_winograd_case(rng, rng.random() < 0.4), _random).args
    ),
    "winograd_stride2_conv2d_packed": lambda rng: _cast(
        rng, winograd_samples._conv(_winograd_case(rng, rng.random() < 0.4), _random, 2).args
    ),
    "winograd_transform_weight": lambda rng: _cast(
        rng, winograd_samples._weight(_winograd_case(rng, False), _random).args
    ),
    "grad_mult_sgd_": _sgd,
    "grad_mult_adamw_": _adamw,
}
FLAT |= {name: lambda rng, name=name: _norm(rng, name) for name in OPS if name.startswith("branch_norm")}
if set(FLAT) != set(OPS):
    raise RuntimeError(f"ops without a fuzzer: {sorted(set(OPS) - set(FLAT))}")

# name -> (function, positional arguments, keyword arguments, whether it is differentiable)
_Call = tuple[Any, list[Any], dict[str, Any], bool]


def _public_squeeze(rng: Any) -> _Call:
    layer = _layer(rng)
    dtype = rng.choice((*_SINGLE, torch.float16, torch.bfloat16))
    fields = {name: None if t is None else t.to(dtype) for name, t in list(layer._asdict().items())[:10]}
    if rng.random() < 0.5:
        fields["prior_filter"] = None
    options = {"groups": layer.groups, "identity_reduce": layer.identity_reduce}
    return ops.orepa_squeeze, [], {**fields, **options}, True


def _public_squeeze_many(rng: Any) -> _Call:
    dtype = rng.choice((*_SINGLE, torch.float16))
    layers = [ops.SqueezeBranches(*(t.to(dtype) if isinstance(t, Tensor) else t for t in _layer(rng))) for _ in "ab"]
    form = rng.choice((torch.contiguous_format, torch.channels_last))
    return ops.orepa_squeeze_many, [layers], {"out_dtype": None, "memory_format": form}, True


def _public_compose(rng: Any) -> _Call:
    *tensors, groups = _compose(rng, "compose_sequential")
    return ops.compose_sequential, tensors, {"groups": groups}, True


def _public_direct(rng: Any) -> _Call:
    own = _direct_case(rng)
    x, packed, bias, residual, *_ = _cast(rng, direct_samples._conv(own, _random).args)
    options: dict[str, Any] = {name: list(getattr(own, name)) for name in ("stride", "padding", "dilation")}
    options |= {"groups": own.groups, "activation": own.activation, "residual": residual}
    if rng.random() < 0.4:
        options |= {"out_channels": own.k, "kernel_size": list(own.kernel)}
        return ops.direct_conv2d_packed, [x, packed, bias], options, False
    weight = torch.randn(own.k, own.c // own.groups, *own.kernel).to(x.dtype)
    methods = ("auto", "fma", "split") if x.dtype is torch.float32 else ("auto", "fma")
    return ops.direct_conv2d, [x, weight, bias], {**options, "method": rng.choice(methods)}, False


def _public_winograd(rng: Any) -> _Call:
    own, stride = _winograd_case(rng, False), rng.choice((1, 2))
    args = _cast(rng, winograd_samples._conv(own, _random, stride).args)
    x, packed, bias, residual = args[:4]
    options = {"padding": own.padding, "groups": own.groups, "activation": own.activation, "residual": residual}
    if rng.random() < 0.4:
        options["out_channels"] = own.k
        if stride == 2:
            return ops.winograd_stride2_conv2d_packed, [x, packed, bias], options, False
        return ops.winograd_conv2d_packed, [x, packed, bias], {**options, "tile": own.tile}, False
    weight = torch.randn(own.k, own.c // own.groups, 3, 3).to(x.dtype)
    if stride == 2:
        return ops.winograd_stride2_conv2d, [x, weight, bias], options, False
    return ops.winograd_conv2d, [x, weight, bias], {**options, "tile": rng.choice(("auto", own.tile))}, False


def _public_weights(rng: Any) -> _Call:
    own = _winograd_case(rng, False)
    weight = torch.randn(own.k, own.c // own.groups, 3, 3)
    name = rng.choice(("direct_pack_weight", "winograd_pack_weight", "winograd_stride2_transform_weight"))
    return getattr(ops, name), [weight], {"groups": own.groups}, False


def _public_norm(rng: Any) -> _Call:
    branches, weights, biases, means, variances, modes, eps, activation = _norm(rng, "branch_norm_add")
    each, given = zip(weights, biases, eps, strict=True), zip(means, variances, strict=True)
    norms: list[Norm | None] = []
    for mode in modes:
        if mode == 2:
            norms.append(None)
            continue
        weight, bias, small = next(each)
        norms.append(Norm(weight, bias, *(next(given) if mode == 1 else (None, None)), small))
    return ops.branch_norm_add, [branches, norms], {"activation": ACTIVATIONS[activation]}, True


def _public_statistics(rng: Any) -> _Call:
    return ops.branch_norm_statistics, list(_norm(rng, "branch_norm_statistics")), {}, True


def _multipliers(rng: Any, shape: tuple[int, ...]) -> Any:
    if len(shape) == 4 and rng.random() < 0.5:
        return ops.ChannelMultiplier(torch.rand(shape[0]), torch.rand(shape[0]) if rng.random() < 0.5 else None)
    return rng.choice((None, torch.rand(shape)))


def _step_tensors(rng: Any) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    shapes = [rng.choice(((3,), (4, 3, 3, 3), (5, 2, 1, 1), ())) for _ in range(rng.choice((1, 2, 3)))]
    return [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes], [_multipliers(rng, s) for s in shapes]


def _public_sgd(rng: Any) -> _Call:
    params, grads, multipliers = _step_tensors(rng)
    momentum = rng.choice((0.0, 0.9))
    options = {"lr": 0.1, "weight_decay": 0.01, "momentum": momentum, "dampening": 0.0, "nesterov": momentum > 0}
    return ops.grad_mult_sgd_, [params, grads, [torch.zeros_like(p) for p in params], multipliers], options, False


def _public_adamw(rng: Any) -> _Call:
    params, grads, multipliers = _step_tensors(rng)
    state = [[torch.rand_like(p) + 0.1 for p in params] for _ in range(3)]
    options = {
        "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": rng.random() < 0.5,
        "steps": [torch.tensor(float(at)) for at in range(len(params))],
    }  # fmt: skip
    return ops.grad_mult_adamw_, [params, grads, *state, multipliers], options, False


PUBLIC: dict[str, Any] = {
    "orepa_squeeze": _public_squeeze,
    "orepa_squeeze_many": _public_squeeze_many,
    "compose_sequential": _public_compose,
    "direct_conv2d": _public_direct,
    "winograd_conv2d": _public_winograd,
    "weights": _public_weights,
    "branch_norm_add": _public_norm,
    "branch_norm_statistics": _public_statistics,
    "grad_mult_sgd_": _public_sgd,
    "grad_mult_adamw_": _public_adamw,
}
