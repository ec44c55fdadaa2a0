"""`repkern bench optim`: a step of RepSGD and RepAdamW on the parameters of a network, against torch and the released.

`repkern bench repopt` runs a whole training step: see repkern/bench/repopt.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repkern.bench import targets
from repkern.bench.results import Row
from repkern.bench.timing import Workload, measure_pairs, quantiles, ratio_of_pairs, settle_allocator
from repkern.models import create_model
from repkern.ops import use_backend
from repkern.optim import GradMult, RepAdamW, RepSGD
from repkern.optim.scales import layers_of

__all__ = ["OptimCase", "OptimOptions", "ReleasedSGD", "grad_mults_of", "optim_cases", "run_optim"]

_MIB = 2**20
_LR, _MOMENTUM, _DECAY = 1e-6, 0.9, 4e-5
_BETAS, _EPS = (0.9, 0.999), 1e-8
# float32 steps against the float64 formula, in units of the last place of the largest value a step touches.
_ULPS = 8.0
_CHECK_STEPS = 3


@dataclass(frozen=True)
class OptimCase:
    """The parameters of a network of `create_model`."""

    name: str
    model: str


@dataclass(frozen=True)
class OptimOptions:
    """What to measure and how long."""

    backend: str = "auto"
    device: str = "cpu"
    pairs: int = 15
    width: float = 1.0


def optim_cases() -> list[OptimCase]:
    """The one of the target, 51.8 M parameters, and a small one, where calls count."""
    return [OptimCase("repopt_vgg_b1", "repopt_vgg_b1"), OptimCase("repvgg_a0", "repvgg_a0")]


class ReleasedSGD:
    """SGD with Grad Mult as the released code of RepOptimizers computes it: a loop, a mask tensor, an op at a time."""

    def __init__(self, params: Sequence[Tensor], masks: Mapping[Tensor, Tensor]) -> None:
        self.params, self.masks = list(params), dict(masks)
        self.buffers = {parameter: torch.zeros_like(parameter) for parameter in self.params}

    @torch.no_grad()
    def step(self) -> None:
        """One step: multiply, decay, momentum, Nesterov, update."""
        for parameter in self.params:
            assert parameter.grad is not None
            gradient = parameter.grad
            if parameter in self.masks:
                gradient = gradient * self.masks[parameter]
            gradient = gradient.add(parameter, alpha=_DECAY)
            buffer = self.buffers[parameter]
            buffer.mul_(_MOMENTUM).add_(gradient)
            gradient = gradient.add(buffer, alpha=_MOMENTUM)
            parameter.add_(gradient, alpha=-_LR)


def grad_mults_of(model: nn.Module) -> dict[Tensor, GradMult]:
    """A GradMult for every 3x3 convolution of a plain network, with scales drawn around 1."""
    generator = torch.Generator().manual_seed(3)

    def scale(channels: int) -> Tensor:
        return 0.5 + torch.rand(channels, generator=generator)

    return {
        layer.weight: GradMult(
            scale(layer.weight.shape[0]), scale(layer.weight.shape[0]), layer.keeps_positions, layer.groups
        )
        for layer in layers_of(model)
        if layer.weight.shape[-1] == 3
    }


def run_optim(
    cases: Sequence[OptimCase], options: OptimOptions, on_row: Callable[[Row], None], say: Callable[[str], None]
) -> list[str]:
    """Hand every row to `on_row` as soon as it is measured; return the failed checks in words."""
    settle_allocator()
    failures: list[str] = []
    for number, case in enumerate(cases, 1):
        torch.manual_seed(0)
        model = create_model(case.model, block="conv_bn", width=options.width).to(options.device)
        count = sum(parameter.numel() for parameter in model.parameters())
        say(f"[{number}/{len(cases)}] {case.name}: {count:,} parameters")
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        mults = grad_mults_of(model)
        with use_backend(options.backend):
            errors = {name: _error(name, options) for name in ("sgd", "adamw")}
        wrong = [f"{case.name}: Rep{name} is {error:.3g} times the bound off" for name, error in errors.items()
                 if not error <= 1]  # fmt: skip
        if wrong:
            failures += wrong
            continue
        _measure(case, model, mults, errors, options, on_row)
    return failures


def _measure(
    case: OptimCase,
    model: nn.Module,
    mults: Mapping[Tensor, GradMult],
    errors: Mapping[str, float],
    options: OptimOptions,
    on_row: Callable[[Row], None],
) -> None:
    params = list(model.parameters())
    sgd: dict[str, Any] = {"momentum": _MOMENTUM, "nesterov": True, "weight_decay": _DECAY}
    adamw: dict[str, Any] = {"betas": _BETAS, "eps": _EPS, "weight_decay": _DECAY}
    masks = {weight: mult.dense(weight.shape).to(weight.device) for weight, mult in mults.items()}
    ours = RepSGD(params, _LR, grad_mults=mults, **sgd)
    rivals: dict[str, Any] = {
        "torch fused": torch.optim.SGD(params, _LR, fused=True, **sgd),
        "released": ReleasedSGD(params, masks),
    }
    _compare(case, "sgd", ours, rivals, errors, options, on_row)
    del rivals, masks, ours
    fused = torch.optim.AdamW(params, _LR, fused=True, **adamw)
    ours_adamw = RepAdamW(params, _LR, grad_mults=mults, **adamw)
    _compare(case, "adamw", ours_adamw, {"torch fused": fused}, errors, options, on_row)
    _memory(case, params, ours_adamw, options, on_row)


def _row(case: OptimCase, what: str, options: OptimOptions) -> Row:
    return Row(kind="optim", op=what, case=case.name, what=what, dtype="float32", device=options.device, mode="eager",
               backend=options.backend)  # fmt: skip


def _compare(
    case: OptimCase,
    what: str,
    ours: Any,
    rivals: Mapping[str, Any],
    errors: Mapping[str, float],
    options: OptimOptions,
    on_row: Callable[[Row], None],
) -> None:
    works = {"ours": Workload(lambda _: ours.step(), around=lambda: use_backend(options.backend))}
    works |= {name: Workload(lambda _, rival=rival: rival.step()) for name, rival in rivals.items()}  # type: ignore[misc]
    samples = measure_pairs(works, pairs=options.pairs, device=options.device)
    p20, p50, p80 = (1e3 * value for value in quantiles(samples["ours"]))
    count = sum(p.numel() for group in ours.param_groups for p in group["params"])
    moved = (20 if what == "sgd" else 28) * count  # bytes: parameter, gradient and state, read and written once
    for name in rivals:
        ratio = ratio_of_pairs(samples[name], samples["ours"])
        target = targets.optim_target(options.device, case.name, what, name)
        on_row(dataclasses.replace(
            _row(case, what, options), ms_p20=p20, ms=p50, ms_p80=p80, baseline=name,
            baseline_ms=1e3 * quantiles(samples[name]).p50, ratio_p20=ratio.p20, ratio=ratio.p50,
            ratio_p80=ratio.p80, pairs=len(samples["ours"]), gbytes_per_s=moved / p50 / 1e6,
            error_over_bound=errors[what], target=str(target or ""), verdict=targets.verdict(target, ratio.p50),
        ))  # fmt: skip


def _memory(
    case: OptimCase, params: Sequence[Tensor], optimizer: Any, options: OptimOptions, on_row: Callable[[Row], None]
) -> None:
    """What the multipliers take, as a share of the parameters: the scales given and what the steps made of them."""
    kept = [mult for mult in optimizer.grad_mults.values()]
    given = sum(t.nbytes for mult in kept for t in (mult.conv_scale, mult.pointwise_scale) if t is not None)
    ready = [value for _, value in optimizer._ready.values()]
    made = sum(t.nbytes for value in ready for t in (value.scale, value.centre) if t is not None)
    size = sum(parameter.nbytes for parameter in params)
    share = 100 * (given + made) / size
    target = targets.optim_memory_target(case.name)
    on_row(dataclasses.replace(
        _row(case, "multipliers", options), kind="optim-memory", extra_mib=(given + made) / _MIB,
        limit_mib=size / _MIB, ratio=share, baseline="parameters", target=str(target or ""),
        verdict=targets.verdict(target, share),
    ))  # fmt: skip


def _error(what: str, options: OptimOptions) -> float:
    """Three steps on a narrow network against the formula in float64, over the bound."""
    torch.manual_seed(1)
    model = create_model("repvgg_a0", block="conv_bn", width=0.125, num_classes=8).to(options.device)
    params, mults = list(model.parameters()), grad_mults_of(model)
    start = [parameter.detach().double().clone() for parameter in params]
    decay = 0.01
    if what == "sgd":
        ours: Any = RepSGD(params, 0.1, _MOMENTUM, weight_decay=decay, nesterov=True, grad_mults=mults)
    else:
        ours = RepAdamW(params, 0.1, _BETAS, _EPS, decay, grad_mults=mults)
    states = [[torch.zeros_like(value) for _ in range(2)] for value in start]
    largest = 0.0
    for step in range(1, _CHECK_STEPS + 1):
        for parameter in params:
            parameter.grad = torch.randn_like(parameter)
        ours.step()
        for at, parameter in enumerate(params):
            assert parameter.grad is not None
            mult = mults.get(parameter)
            gradient = parameter.grad.double()
            mask = torch.ones_like(gradient)
            if mult is not None:
                mask = mult.dense(parameter.shape, 2 if what == "sgd" else 1).to(gradient)
            update = _sgd_update if what == "sgd" else _adamw_update
            start[at] = update(start[at], gradient, mask, states[at], decay, step)
    for parameter, wanted in zip(params, start, strict=True):
        bound = _ULPS * _CHECK_STEPS * torch.finfo(torch.float32).eps * float(wanted.abs().max() + 1)
        largest = max(largest, float((parameter.detach().double() - wanted).abs().max()) / bound)
    return largest


def _sgd_update(value: Tensor, gradient: Tensor, mask: Tensor, state: list[Tensor], decay: float, step: int) -> Tensor:
    gradient = mask * gradient + decay * value
    state[0] = _MOMENTUM * state[0] + gradient
    return value - 0.1 * (gradient + _MOMENTUM * state[0])


def _adamw_update(
    value: Tensor, gradient: Tensor, mask: Tensor, state: list[Tensor], decay: float, step: int
) -> Tensor:
    gradient = mask * gradient
    state[0] = _BETAS[0] * state[0] + (1 - _BETAS[0]) * gradient
    state[1] = _BETAS[1] * state[1] + (1 - _BETAS[1]) * gradient.square()
    first, second = state[0] / (1 - _BETAS[0] ** step), state[1] / (1 - _BETAS[1] ** step)
    return value * (1 - 0.1 * decay) - 0.1 * mask * first / (second.sqrt() + _EPS)
