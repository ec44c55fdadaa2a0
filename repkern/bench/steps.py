"""Optimizer steps over the parameters of a whole network: ours with a multiplier on every convolution, in pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from repkern.bench import targets
from repkern.bench.registry import Case
from repkern.bench.results import Row
from repkern.bench.timing import Workload, measure_pairs, quantiles, ratio_of_pairs
from repkern.models import create_model
from repkern.ops import OPS, ChannelMultiplier, grad_mult_adamw_, grad_mult_sgd_, use_backend
from repkern.ops._grad_mult import Packed, pack_multipliers
from repkern.testing import samples_of, worst_ratio
from repkern.testing.inputs import map_tensors

__all__ = ["StepProblem", "run_steps"]

_LR, _DECAY, _MOMENTUM, _BETAS, _EPS = 0.01, 1e-4, 0.9, (0.9, 0.999), 1e-8


class StepProblem:
    """Parameters, gradients and state of a network, and the steps over them that are compared.

    `steps`: ours; torch's fused optimizer, which multiplies nothing; the released formulation, a loop over parameters
    with dense multipliers.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [tuple(p.shape) for p in create_model(case.network, block="plain").parameters()]

        def random(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

        self.case = case
        self.adam = case.op == "grad_mult_adamw"
        self.op = OPS[f"{case.op}_"]
        self.params, self.grads = [random(s) for s in shapes], [random(s) * 1e-3 for s in shapes]
        self.state = [[torch.zeros_like(p) for p in self.params] for _ in range(2 if self.adam else 1)]
        self.counts = [torch.zeros((), device=device) for _ in shapes]
        self.multipliers = [
            ChannelMultiplier(random(s[:1]).abs(), random(s[:1]).abs(), float(s[0] == s[1])) if len(s) == 4 else None
            for s in shapes
        ]
        self.dense = [None if m is None else m.dense(s) for m, s in zip(self.multipliers, shapes, strict=True)]
        self.steps: dict[str, Callable[[], Any]] = {
            "ours": self.ours,
            "torch fused": self._fused(),
            "released": self._released_adamw if self.adam else self._released_sgd,
        }

    def ours(self) -> None:
        """All parameters in one launch."""
        if self.adam:
            grad_mult_adamw_(
                self.params, self.grads, self.state[0], self.state[1], None, self.multipliers,
                lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, steps=self.counts, multiply_update=True,
            )  # fmt: skip
        else:
            grad_mult_sgd_(
                self.params, self.grads, self.state[0], self.multipliers, lr=_LR, weight_decay=_DECAY,
                momentum=_MOMENTUM,
            )  # fmt: skip

    def _fused(self) -> Callable[[], Any]:
        params = [torch.nn.Parameter(p.clone()) for p in self.params]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad
        if self.adam:
            return torch.optim.AdamW(params, lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, fused=True).step
        return torch.optim.SGD(params, lr=_LR, momentum=_MOMENTUM, weight_decay=_DECAY, fused=True).step

    def _released_sgd(self) -> None:
        for p, grad, b, m in zip(self.params, self.grads, self.state[0], self.dense, strict=True):
            g = (grad if m is None else grad * m).add(p, alpha=_DECAY)
            p.add_(b.mul_(_MOMENTUM).add_(g), alpha=-_LR)

    def _released_adamw(self) -> None:
        for p, grad, mean, square, m in zip(self.params, self.grads, *self.state, self.dense, strict=True):
            g = grad if m is None else grad * m
            p.mul_(1 - _LR * _DECAY)
            mean.lerp_(g, 1 - _BETAS[0])
            square.mul_(_BETAS[1]).addcmul_(g, g, value=1 - _BETAS[1])
            p.addcdiv_(mean if m is None else mean * m, square.sqrt().add_(_EPS), value=-_LR)

    @property
    def bytes(self) -> int:
        """What a step must move: gradients read, parameters and state read and written."""
        moved = sum(t.numel() * t.element_size() for t in self.params)
        return moved * (3 + 2 * len(self.state))

    @property
    def flops(self) -> int:
        """Multiplications, additions, divisions and roots of a step, M counted as one multiplication."""
        return sum(t.numel() for t in self.params) * (16 if self.adam else 7)

    def check(self) -> float:
        """The worst error over its bound of one step, on the first, the largest and the last parameter."""
        chosen = sorted({0, max(range(len(self.params)), key=lambda i: self.params[i].numel()), len(self.params) - 1})
        before = self._arguments(chosen)
        exact = map_tensors(before, lambda t: t.to("cpu", torch.float64, copy=True))
        bounds = samples_of(self.op)[1].bounds
        assert bounds is not None
        allowed = bounds(map_tensors(exact, torch.clone), self.params[0].dtype)
        with torch.no_grad():
            self.ours()
            self.op.implementation("reference")(*exact)
        got = [self.params[at] for at in chosen] + [tensors[at] for tensors in self.state for at in chosen]
        kinds = [exact[0], *exact[2 : 2 + len(self.state)]]
        wanted = [t for tensors in kinds for t in tensors]
        return max(worst_ratio(a, b, bound)[0] for a, b, bound in zip(got, wanted, allowed, strict=True))

    def _arguments(self, chosen: Sequence[int]) -> tuple[Any, ...]:
        def pick(tensors: Sequence[Any]) -> list[Any]:
            return [tensors[at] for at in chosen]

        lists = [[t.clone() for t in pick(tensors)] for tensors in (self.params, self.grads, *self.state)]
        packed: Packed = pack_multipliers(self.op.name, len(chosen), pick(self.multipliers))
        rates, decays = [_LR] * len(chosen), [_DECAY] * len(chosen)
        if self.adam:
            counts = [t.clone() for t in pick(self.counts)]
            flags = (False, False, True, True, None, None)
            return (*lists, [], counts, *packed, rates, decays, *_BETAS, _EPS, *flags)
        return (*lists, *packed, rates, decays, [0] * len(chosen), _MOMENTUM, 0.0, False, False, None, None)


def run_steps(case: Case, options: Any, on_row: Callable[[Row], None], say: Callable[[str], None]) -> list[str]:
    """Check, then time ours on every backend of `options` against the baselines and a copy; failed checks in words."""
    problem = StepProblem(case, options.dtype, options.device)
    failures: list[str] = []
    for backend in options.backends:
        with use_backend(backend):
            worst = problem.check()
        if not worst <= 1:
            failures.append(f"{case.name}: {backend} differs from the float64 reference, {worst:.3g} times the bound")
            say(f"  WRONG {failures[-1]}; not timed")
            continue
        _measure(problem, backend, worst, options, on_row)
    return failures


def _measure(problem: StepProblem, backend: str, worst: float, options: Any, on_row: Callable[[Row], None]) -> None:
    names = ("ours", "torch fused", "released") if options.baselines else ("ours",)
    around = functools.partial(use_backend, backend)
    works = {name: Workload(_ignoring_state(problem.steps[name]), around=around) for name in names}
    source = torch.empty(problem.bytes // 8, device=options.device)  # float32, read and written
    copy = torch.empty_like(source)
    works["copy"] = Workload(lambda _: copy.copy_(source))
    with torch.no_grad():
        samples = measure_pairs(
            works, pairs=options.pairs, min_sample_seconds=options.min_sample_seconds,
            max_seconds=options.max_seconds, device=options.device,
        )  # fmt: skip
    p20, p50, p80 = (1e3 * value for value in quantiles(samples["ours"]))
    common: dict[str, Any] = {
        "kind": "ops", "op": problem.case.op, "case": problem.case.name, "what": "step",
        "dtype": str(options.dtype).removeprefix("torch."), "device": options.device, "mode": "eager",
        "backend": backend, "ms_p20": p20, "ms": p50, "ms_p80": p80, "pairs": len(samples["ours"]),
        "error_over_bound": worst,
    }  # fmt: skip
    percent = 100 * ratio_of_pairs(samples["copy"], samples["ours"]).p50
    rates: dict[str, Any] = {"gflops": problem.flops / p50 / 1e6, "gbytes_per_s": problem.bytes / p50 / 1e6}
    on_row(Row(**common, **rates, peak_percent=percent, peak_source="copy"))
    for name in names[1:]:
        ratio = ratio_of_pairs(samples[name], samples["ours"])
        target = targets.optim_target(
            options.device, problem.case.network, problem.case.op.removeprefix("grad_mult_"), name
        )
        on_row(
            Row(
                **common, baseline=name, baseline_ms=1e3 * quantiles(samples[name]).p50,
                ratio_p20=ratio.p20, ratio=ratio.p50, ratio_p80=ratio.p80,
                target=str(target or ""), verdict=targets.verdict(target, ratio.p50),
            )
        )  # fmt: skip


def _ignoring_state(step: Callable[[], Any]) -> Callable[[Any], None]:
    def run(_: Any) -> None:
        step()

    return run
