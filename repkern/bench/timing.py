"""Paired timing: A B A B ... in one run, because absolute times drift between runs and machines."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = [
    "Quantiles",
    "Workload",
    "graphed",
    "measure_pairs",
    "quantiles",
    "ratio_of_pairs",
    "settle_allocator",
    "strict_fp32",
]

_WARMUP_RUNS = 2
_MAX_INNER = 10_000
_FEWEST_PAIRS = 5


class Quantiles(NamedTuple):
    """The 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Workload:
    """What one sample times: `run(prepare())`, of which only `run` counts, inside `around()`.

    `sample(inner)`: seconds a run over `inner` runs, of work that times itself (in another process); `run` is unused.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    sample: Callable[[int], float] | None = None


def quantiles(values: list[float]) -> Quantiles:
    """p20, p50, p80 by linear interpolation. ValueError for an empty list."""
    if not values:
        raise ValueError("quantiles of an empty list of samples")
    if len(values) == 1:
        return Quantiles(values[0], values[0], values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Quantiles(tenths[1], tenths[4], tenths[7])


def ratio_of_pairs(numerator: list[float], denominator: list[float]) -> Quantiles:
    """Quantiles of numerator[i] / denominator[i], the samples taken next to each other."""
    if len(numerator) != len(denominator):
        raise ValueError(f"samples must come in pairs, got {len(numerator)} and {len(denominator)}")
    return quantiles([a / b for a, b in zip(numerator, denominator, strict=True)])


def measure_pairs(
    workloads: Mapping[str, Workload],
    *,
    pairs: int,
    min_sample_seconds: float = 0.01,
    max_seconds: float = math.inf,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Seconds a run, `pairs` samples of each workload, interleaved A B A B.

    A sample repeats its workload until it lasts `min_sample_seconds`. What would take longer than `max_seconds` gets
    fewer pairs, but five at least (or `pairs`, if that is less). CUDA times come from events. Beside workloads of other
    processes, which run once before they are timed, those of this one do so too: its threads and caches went cold.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    once = {name: _once(work, min_sample_seconds, device) for name, work in workloads.items()}
    inner = {name: _runs(min_sample_seconds, seconds) for name, seconds in once.items()}
    round_seconds = sum(inner[name] * seconds for name, seconds in once.items())
    pairs = min(pairs, max(_FEWEST_PAIRS, int(max_seconds / round_seconds) if max_seconds < math.inf else pairs))
    samples: dict[str, list[float]] = {name: [] for name in workloads}
    others = any(work.sample is not None for work in workloads.values())
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(pairs):
            for name, work in workloads.items():
                if others and work.sample is None:
                    _sample(work, 1, device)
                samples[name].append(_sample(work, inner[name], device))
    finally:
        if was_enabled:
            gc.enable()
    return samples


@contextlib.contextmanager
def strict_fp32() -> Iterator[None]:
    """No TF32 in anything measured, which is not what torch does in convolutions by default."""
    flags: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = False
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def settle_allocator() -> None:
    """Put the C allocator into the state it has in a training process.

    glibc returns freed memory to the system at once until a block of up to 32 MiB has been freed, as any real network
    does in its first step; before that, whoever is measured pays a page fault for every 4 KiB of every result.
    """
    torch.empty(31 << 20, dtype=torch.uint8).fill_(0)


def graphed(work: Workload) -> Workload:
    """`work` captured in a CUDA graph: what it costs without the host's launch overhead. Needs no `prepare`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), work.around():
        for _ in range(3):
            work.run(work.prepare())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with work.around(), torch.cuda.graph(graph):
        work.run(work.prepare())
    return Workload(lambda _: graph.replay())


def _once(work: Workload, min_sample_seconds: float, device: str) -> float:
    """Seconds a run when warm: the first runs after another workload are several times slower than the rest."""
    _sample(work, _WARMUP_RUNS, device)
    cold = _sample(work, 1, device)
    return min(cold, _sample(work, _runs(min_sample_seconds / 2, cold), device))


def _runs(seconds: float, once: float) -> int:
    """How many runs of `once` seconds last `seconds`."""
    return max(1, min(_MAX_INNER, math.ceil(seconds / max(once, 1e-9))))


def _sample(work: Workload, inner: int, device: str) -> float:
    if work.sample is not None:
        return work.sample(inner)
    with work.around():
        return _sample_cuda(work, inner) if device == "cuda" else _sample_host(work, inner)


def _sample_host(work: Workload, inner: int) -> float:
    total = 0.0
    for _ in range(inner):
        state = work.prepare()
        start = time.perf_counter()
        result = work.run(state)
        total += time.perf_counter() - start
        # Freed outside of the clock in both members of a pair.
        del result, state
    return total / inner


def _sample_cuda(work: Workload, inner: int) -> float:
    events = []
    for _ in range(inner):
        state = work.prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work.run(state)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / inner / 1e3
