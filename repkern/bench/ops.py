"""`repkern bench ops`: for every case check all implementations, then time them in pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from repkern.bench import targets
from repkern.bench.peak import Peak, measure_peak
from repkern.bench.problems import CheckResult, Forward, Problem, build_problem
from repkern.bench.registry import Case
from repkern.bench.results import Row
from repkern.bench.steps import run_steps
from repkern.bench.timing import (
    Workload,
    graphed,
    measure_pairs,
    quantiles,
    ratio_of_pairs,
    settle_allocator,
    strict_fp32,
)
from repkern.ops import available_backends, use_backend

__all__ = ["BASELINES", "PASSES", "OpsOptions", "default_backends", "run_ops"]

PASSES = ("forward", "backward", "forward+backward")
BASELINES = ("eager", "compile", "conv2d")
_ATTEMPTS = 3
_BUSY = 0.85  # of the peak rate: below it somebody else was using the machine
_SUSPICIOUS = 0.7
_RECOMPILES = 64  # one a layer shape of the largest case


@dataclass(frozen=True)
class OpsOptions:
    """What to measure and how long. `ours` replaces our implementation by name: used to test the check itself."""

    backends: Sequence[str]
    baselines: Sequence[str] = BASELINES
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    pairs: int = 15
    min_sample_seconds: float = 0.01
    max_seconds: float = 12.0
    cuda_graph: bool = False
    quick: bool = False
    ours: Mapping[str, Callable[[Problem], Forward]] = field(default_factory=dict)


def default_backends(device: str) -> list[str]:
    """The native backends that can run on `device`, the reference when there is none."""
    wanted = ("cpu",) if device == "cpu" else ("cuda", "triton")
    found = [name for name in wanted if available_backends()[name] is None]
    return found or ["reference"]


@strict_fp32()
def run_ops(
    cases: Sequence[Case], options: OpsOptions, on_row: Callable[[Row], None], say: Callable[[str], None]
) -> list[str]:
    """Hand every row to `on_row` as soon as it is measured; return the failed checks in words."""
    settle_allocator()
    peak = measure_peak(options.dtype, options.device, quick=options.quick)
    say(f"peak: {peak.gflops:.0f} GFLOP/s ({peak.source}); upper bound: {peak.bound}")
    if peak.bound_gflops is not None and peak.gflops < _SUSPICIOUS * peak.bound_gflops:
        say("WARNING: that is far below the bound: another process uses the machine, or its cores have one FMA unit")
    say(f"percentages refer to {peak.source}, timed in turn with ours")
    failures: list[str] = []
    for number, case in enumerate(cases, 1):
        say(f"[{number}/{len(cases)}] {case.op} {case.name}")
        if case.network:
            failures += run_steps(case, options, on_row, say)
            continue
        problem = build_problem(case, dtype=options.dtype, device=options.device)
        forwards, checks, failed = _checked(problem, options, say)
        failures += failed
        for what in PASSES:
            if set(options.backends) & set(forwards):
                _measure(problem, what, forwards, checks, peak, options, on_row, say)
    return failures


def _checked(
    problem: Problem, options: OpsOptions, say: Callable[[str], None]
) -> tuple[dict[str, Forward], dict[str, CheckResult], list[str]]:
    """The implementations that are right, their errors, and what is said of the ones that are not."""
    forwards: dict[str, Forward] = {}
    checks: dict[str, CheckResult] = {}
    failures: list[str] = []
    for name, forward in _implementations(problem, options).items():
        try:
            with _around(name, options)():
                result = problem.check(forward)
        except (RuntimeError, NotImplementedError) as error:
            if name in options.backends:
                raise
            say(f"  {name}: left out, it cannot run here ({str(error).splitlines()[0]})")
            continue
        if result.ok:
            forwards[name], checks[name] = forward, result
        else:
            off = f"{result.where}, {result.worst:.3g} times the bound"
            failures.append(f"{problem.case.name}: {name} differs from the float64 reference: {off}")
            say(f"  WRONG {failures[-1]}; not timed")
    return forwards, checks, failures


def _implementations(problem: Problem, options: OpsOptions) -> dict[str, Forward]:
    answer: dict[str, Forward] = {}
    for backend in options.backends:
        answer[backend] = options.ours[backend](problem) if backend in options.ours else problem.ours
    if "eager" in options.baselines:
        answer["eager"] = problem.baseline(lambda function: function)
    if "compile" in options.baselines:
        torch.compiler.reset()
        answer["compile"] = problem.baseline(functools.partial(torch.compile, dynamic=False, fullgraph=True))
    return answer


def _around(name: str, options: OpsOptions) -> Callable[[], contextlib.AbstractContextManager[None]]:
    if name in options.backends and name not in options.ours:
        return functools.partial(use_backend, name)
    return _compiling if name == "compile" else contextlib.nullcontext


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    # torch warns of its own deprecations while compiling; none concerns a measurement.
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=_RECOMPILES):  # type: ignore[attr-defined]
        warnings.simplefilter("ignore")
        yield


def _workload(
    problem: Problem, forward: Forward, what: str, around: Callable[..., contextlib.AbstractContextManager]
) -> Workload:
    if what == "forward":
        return Workload(lambda _: forward(), around=around)
    if what == "backward":
        return Workload(problem.gradients, prepare=forward, around=around)
    return Workload(lambda _: problem.gradients(forward()), around=around)


def _conv_workload(problem: Problem, what: str) -> Workload | None:
    """The 3x3 convolution that a squeezed kernel feeds, at the feature map size and batch of a ResNet."""
    if problem.case.op != "orepa_squeeze" or what == "backward":
        return None
    layer = problem.case.layers[0]
    size = max(7, min(56, 3584 // layer.ci))
    like = problem.leaves[0].detach()
    x = torch.randn(32, layer.ci, size, size, dtype=like.dtype, device=like.device, requires_grad=True)
    w = torch.randn_like(problem.grads[0], requires_grad=True)

    def forward() -> torch.Tensor:
        return torch.conv2d(x, w, padding=layer.k // 2, groups=layer.groups)

    grad = torch.randn_like(forward())
    if what == "forward":
        return Workload(lambda _: forward())
    return Workload(lambda _: torch.autograd.grad(forward(), (x, w), grad))


def _measure(
    problem: Problem,
    what: str,
    forwards: Mapping[str, Forward],
    checks: Mapping[str, CheckResult],
    peak: Peak,
    options: OpsOptions,
    on_row: Callable[[Row], None],
    say: Callable[[str], None],
) -> None:
    if options.cuda_graph and what == "backward":
        return  # a graph of the backward alone would keep the forward's buffers of another graph alive
    works = {name: _workload(problem, forward, what, _around(name, options)) for name, forward in forwards.items()}
    conv = _conv_workload(problem, what) if "conv2d" in options.baselines else None
    if conv is not None:
        works["conv2d"] = conv
    if options.cuda_graph:
        works = {name: graphed(work) for name, work in works.items()}
    works["peak"] = Workload(lambda _: peak.run())
    samples = _undisturbed(works, peak, options, say)
    for backend in options.backends:
        if backend not in samples:
            continue
        on_row(_own_row(problem, what, backend, samples, checks, peak, options))
        for baseline in BASELINES:
            if baseline in samples:
                on_row(_pair_row(problem, what, backend, baseline, samples, checks, options))


def _undisturbed(
    works: Mapping[str, Workload], peak: Peak, options: OpsOptions, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Samples taken while the peak workload ran at its usual rate; after some attempts the last ones, and a warning."""
    for attempt in range(1 if options.quick else _ATTEMPTS):
        samples = measure_pairs(
            works,
            pairs=options.pairs,
            min_sample_seconds=options.min_sample_seconds,
            max_seconds=options.max_seconds,
            device=options.device,
        )
        rate = peak.flops / quantiles(samples["peak"]).p50 / 1e9
        if options.quick or rate >= _BUSY * peak.gflops:
            break
        again = "measuring again" if attempt < _ATTEMPTS - 1 else "the rows that follow are from a busy machine"
        say(f"  the machine is busy: peak at {rate:.0f} instead of {peak.gflops:.0f} GFLOP/s; {again}")
    return samples


def _common(
    problem: Problem, what: str, backend: str, samples: Mapping[str, list[float]], checks: Mapping[str, CheckResult],
    options: OpsOptions,
) -> Row:  # fmt: skip
    p20, p50, p80 = (1e3 * value for value in quantiles(samples[backend]))
    return Row(
        kind="ops", op=problem.case.op, case=problem.case.name, what=what,
        dtype=str(options.dtype).removeprefix("torch."), device=options.device,
        mode="cuda-graph" if options.cuda_graph else "eager", backend=backend,
        ms_p20=p20, ms=p50, ms_p80=p80, pairs=len(samples[backend]), error_over_bound=checks[backend].worst,
    )  # fmt: skip


def _own_row(
    problem: Problem, what: str, backend: str, samples: Mapping[str, list[float]], checks: Mapping[str, CheckResult],
    peak: Peak, options: OpsOptions,
) -> Row:  # fmt: skip
    row = _common(problem, what, backend, samples, checks, options)
    seconds = quantiles(samples[backend]).p50
    gflops = problem.case.flops(what) / seconds / 1e9
    peak_gflops = peak.flops / quantiles(samples["peak"]).p50 / 1e9
    percent = 100 * problem.case.flops(what) / peak.flops * ratio_of_pairs(samples["peak"], samples[backend]).p50
    target = targets.peak_target(options.device, problem.case.name, what)
    return dataclasses.replace(
        row, gflops=gflops, gbytes_per_s=problem.bytes(what) / seconds / 1e9, peak_percent=percent,
        peak_gflops=peak_gflops, peak_source=peak.source, target=str(target or ""),
        verdict=targets.verdict(target, percent if options.device == "cpu" else 1e6 * seconds),
    )  # fmt: skip


def _pair_row(
    problem: Problem, what: str, backend: str, baseline: str, samples: Mapping[str, list[float]],
    checks: Mapping[str, CheckResult], options: OpsOptions,
) -> Row:  # fmt: skip
    row = _common(problem, what, backend, samples, checks, options)
    ratio = ratio_of_pairs(samples[baseline], samples[backend])
    target = targets.ops_target(options.device, problem.case.name, what, baseline)
    return dataclasses.replace(
        row, baseline=baseline, baseline_ms=1e3 * quantiles(samples[baseline]).p50,
        ratio_p20=ratio.p20, ratio=ratio.p50, ratio_p80=ratio.p80,
        target=str(target or ""), verdict=targets.verdict(target, ratio.p50),
    )  # fmt: skip
