"""`repkern bench conv`: 3x3 convolutions of stride 1, ours against torch.conv2d and ncnn's Winograd convolution."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repkern import _native
from repkern.bench import targets
from repkern.bench.conv_methods import (
    DTYPES,
    FORMATS,
    Method,
    allowed_error,
    layer_methods,
    op_methods,
    precision,
    torch_methods,
)
from repkern.bench.registry import ConvCase, conv_cases
from repkern.bench.remote import Remote
from repkern.bench.results import Row
from repkern.bench.rivals import missing
from repkern.bench.timing import Workload, measure_pairs, quantiles, ratio_of_pairs, settle_allocator
from repkern.ops import use_backend

__all__ = ["COLD", "WARM", "ConvOptions", "run_conv"]

#: The same weights call after call, or many copies in turn, so that they come from beyond the level-2 cache.
WARM, COLD = "eager", "cold weights"
_COLD_BYTES = 16 << 20
_MOST_COPIES = 64
_CHOOSING = "p20"  # as optimize_for_inference, by the quick samples: disturbances only ever add time
_NCNN_ALLOWED = 1e-5  # it takes F(6x6) where it finds it faster


@dataclass(frozen=True)
class ConvOptions:
    """What to measure and how long. how: one of `DTYPES`. ncnn: as a rival on the CPU, where it is installed."""

    backend: str = "cpu"
    device: str = "cpu"
    how: str = "fp32"
    tiles: Sequence[int] = (2, 4, 5)
    threads: int = 1
    ncnn: bool = True
    cold: bool = True
    choosing_pairs: int = 7
    pairs: int = 15
    min_sample_seconds: float = 0.01
    max_seconds: float = 3.0


def run_conv(
    cases: Sequence[ConvCase], options: ConvOptions, on_row: Callable[[Row], None], say: Callable[[str], None]
) -> list[str]:
    """Hand every row to `on_row` as soon as it is measured. Returns [] (a wrong result of ours is a RuntimeError).

    Per case one row for each of our methods and formats (cold: channels_last), from a first set of samples: the public
    ops, and as a layer of an optimized network calls them. The fastest of ours and torch in both formats are measured
    again, warm with ncnn: rows "best: <method>" against the faster format of torch and against ncnn, and "dispatched:
    <method>", the fastest of all in the first set, torch's own included, against torch. At the end medians over the
    cases, with verdicts when all layers of `CONV_CASES` were measured. Nothing wrong is timed.
    """
    settle_allocator()
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        on_row(row)

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(precision(options.how))
        stack.enter_context(use_backend(options.backend))
        remote = _ncnn(options, say)
        if remote is not None:
            stack.enter_context(remote)
        for number, case in enumerate(cases, 1):
            say(f"[{number}/{len(cases)}] {case.name}")
            layer = _Layer(case, options, remote, say)
            layer.check()
            for mode in (WARM, COLD) if options.cold else (WARM,):
                layer.measure(mode, keep)
    for row in _medians(rows, cases, options):
        on_row(row)
    return []


def _ncnn(options: ConvOptions, say: Callable[[str], None]) -> Remote | None:
    if not options.ncnn or options.device != "cpu" or options.how != "fp32":
        return None
    if missing("ncnn"):
        say("ncnn is left out: not installed (pip install 'repkern[rivals]')")
        return None
    return Remote("ncnn", "repkern.bench.conv_methods:NcnnConv", options.threads)


class _Layer:
    """One case: its tensors, its methods, its measurements."""

    def __init__(self, case: ConvCase, options: ConvOptions, remote: Remote | None, say: Callable[[str], None]) -> None:
        self.case, self.options, self.remote, self.say = case, options, remote, say
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(case.n, case.c, case.h, case.w, generator=generator, dtype=torch.float64).relu()
        weight = torch.randn(case.k, case.c, 3, 3, generator=generator, dtype=torch.float64) / (9 * case.c) ** 0.5
        dtype = DTYPES[options.how]
        self.maps = {name: x.to(options.device, dtype, memory_format=form) for name, form in FORMATS.items()}
        self.weight = weight.to(options.device, dtype)
        self.ends = sorted({0, case.n - 1})  # of the batch: what is compared with float64
        self.exact = torch.conv2d(
            self.maps["nchw"][self.ends].double().cpu(), self.weight.double().cpu(), padding=1
        )  # fmt: skip
        weight_bytes = self.weight.numel() * self.weight.element_size()
        self.copies = {WARM: 1, COLD: min(_MOST_COPIES, max(2, math.ceil(_COLD_BYTES / weight_bytes)))}
        self.methods = [
            *op_methods(case.k, options.how, options.device, options.tiles),
            *layer_methods(self.maps["channels_last"], case.k, options.how, options.tiles),
            *torch_methods(),
        ]

    def check(self) -> None:
        """RuntimeError for a result of ours or torch that is further from float64 than it may be."""
        for method in self.methods:
            packed = method.pack(self.weight)
            for form in method.formats:
                error = self._error(method.bind(self.maps[form], packed)())
                allowed = allowed_error(self.options.how, method.tile)
                if not error <= allowed:
                    raise RuntimeError(
                        f"{self.case.name}, {method.name} {form}: relative error {error:.2e}, allowed {allowed:.0e}; "
                        "not timed"
                    )

    def measure(self, mode: str, on_row: Callable[[Row], None]) -> None:
        """First all methods, then the best of ours, torch in both formats and ncnn again."""
        calls = {
            whose: self._calls([method for method in self.methods if method.whose == whose], mode)
            for whose in ("ours", "onednn", "torch")
        }
        ours, torchs = calls["ours"], calls["torch"]
        everything = {**ours, **calls["onednn"], **torchs}
        first = self._time(everything, self.options.choosing_pairs)
        baseline, best, dispatched = (_fastest(first, names, _CHOOSING) for names in (torchs, ours, everything))
        for name in (*ours, *calls["onednn"]):
            on_row(self._row(name, mode, baseline, first[name], first[baseline]))
        finalists = {best: ours[best], **torchs, dispatched: everything[dispatched]}
        # Many small networks of ncnn in turn allocate more than they compute: 16 times slower, which says nothing.
        if mode == WARM and self.remote is not None and self._prepare_ncnn(self.remote, mode):
            finalists["ncnn"] = self.remote.workload()
        final = self._time(finalists, self.options.pairs)
        baseline = _fastest(final, torchs)
        on_row(self._row(f"best: {best}", mode, baseline, final[best], final[baseline]))
        if "ncnn" in final:
            on_row(self._row(f"best: {best}", mode, "ncnn", final[best], final["ncnn"]))
        on_row(self._row(f"dispatched: {dispatched}", mode, baseline, final[dispatched], final[baseline]))

    def _calls(self, methods: Sequence[Method], mode: str) -> dict[str, Workload]:
        calls = {}
        for method in methods:
            copies = [method.pack(self.weight.clone()) for _ in range(self.copies[mode])]
            for form in method.formats if mode == WARM or len(method.formats) == 1 else ("channels_last",):
                bound = [method.bind(self.maps[form], packed) for packed in copies]
                calls[f"{method.name} {form}"] = _workload(bound)
        return calls

    def _prepare_ncnn(self, remote: Remote, mode: str) -> bool:
        # As numpy arrays: a tensor would be moved to shared memory on its way.
        answer = remote.prepare(self.weight.numpy(), self.maps["nchw"].numpy(), self.copies[mode])
        error = self._error(torch.from_numpy(answer))
        if not error <= _NCNN_ALLOWED:
            self.say(f"  ncnn is left out: relative error {error:.2e}, allowed {_NCNN_ALLOWED:.0e}")
        return error <= _NCNN_ALLOWED

    def _error(self, got: Tensor) -> float:
        return float((got[self.ends].double().cpu() - self.exact).norm() / self.exact.norm())

    def _time(self, works: Mapping[str, Workload], pairs: int) -> dict[str, list[float]]:
        return measure_pairs(
            works, pairs=pairs, min_sample_seconds=self.options.min_sample_seconds,
            max_seconds=self.options.max_seconds, device=self.options.device,
        )  # fmt: skip

    def _row(self, what: str, mode: str, baseline: str, ours: list[float], theirs: list[float]) -> Row:
        time, ratio = quantiles(ours), ratio_of_pairs(theirs, ours)
        return Row(
            kind="conv", op="conv3x3", case=self.case.name, what=what, dtype=_dtype(self.options),
            device=self.options.device, mode=mode, backend=self.options.backend, ms_p20=time.p20 * 1e3,
            ms=time.p50 * 1e3, ms_p80=time.p80 * 1e3, baseline=baseline, baseline_ms=quantiles(theirs).p50 * 1e3,
            ratio_p20=ratio.p20, ratio=ratio.p50, ratio_p80=ratio.p80, pairs=len(ours),
            gflops=self.case.flops() / time.p50 / 1e9,
        )  # fmt: skip


def _workload(calls: Sequence[Callable[[], Tensor]]) -> Workload:
    turn = itertools.cycle(calls)
    return Workload(lambda call: call(), prepare=lambda: next(turn))


def _fastest(samples: Mapping[str, list[float]], names: Iterable[str], by: str = "p50") -> str:
    return min(names, key=lambda name: getattr(quantiles(samples[name]), by))


def _dtype(options: ConvOptions) -> str:
    return "tf32" if options.how == "tf32" else str(DTYPES[options.how]).removeprefix("torch.")


def _medians(rows: Sequence[Row], cases: Sequence[ConvCase], options: ConvOptions) -> list[Row]:
    """Over all cases: the median of "best" against torch and ncnn, and the least of "dispatched".

    The targets are those of repeated calls with the same weights, over all layers of the default list.
    """
    answer = []
    complete = set(conv_cases()) <= set(cases)
    how = options.how
    if options.device == "cpu" and how == "fp32":
        isa = str(_native.native_build_info().get("isa_used"))
        how = "avx512" if isa == "amx" else isa
    for mode in (WARM, COLD):
        for what, rival in (("best", "torch"), ("best", "ncnn"), ("dispatched", "torch")):
            found = [
                r for r in rows if r.what.startswith(f"{what}:") and r.mode == mode and r.baseline.startswith(rival)
            ]
            if not found:
                continue
            ratios = [row.ratio or 0.0 for row in found]
            value = statistics.median(ratios) if what == "best" else min(ratios)
            target = None
            if complete and mode == WARM:
                target = targets.conv_target(options.device, how, rival if what == "best" else what)
            spread = quantiles(ratios)
            answer.append(replace(
                found[0], kind="conv-median", case=f"{len(found)} layers",
                what="best, median" if what == "best" else "dispatched, slowest", baseline=rival, ms_p20=None, ms=None,
                ms_p80=None, baseline_ms=None, gflops=None, ratio_p20=spread.p20, ratio=value, ratio_p80=spread.p80,
                target=str(target or ""), verdict=targets.verdict(target, value),
            ))  # fmt: skip
    return answer
