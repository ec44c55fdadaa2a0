"""The rate that "percent of peak" refers to: the best large product or convolution of torch, in turn with ours."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "measure_peak"]

_REPEATS = 6
_FMA_FLOPS = 2
_VECTOR_BITS = {"amx": 512, "avx512": 512, "avx2": 256}
_FMA_UNITS = 2  # of every x86 server core with these widths; a printed upper bound, no result depends on it


@dataclass(frozen=True)
class Peak:
    """The measured rate, what gave it, and (in words) what the clock and the vector width allow.

    `run` does `flops` operations: it is timed again next to each measurement, so that both see the same machine.
    """

    gflops: float
    source: str
    bound: str
    bound_gflops: float | None
    flops: float
    run: Callable[[], object]


def measure_peak(dtype: torch.dtype, device: str, *, quick: bool = False) -> Peak:
    """Time large matrix products and 3x3 convolutions; the best of all repeats counts."""
    candidates = _candidates(dtype, device, quick)
    rates = {name: flops / _fastest(run, device) / 1e9 for name, (flops, run) in candidates.items()}
    source = max(rates, key=lambda name: rates[name])
    flops, run = candidates[source]
    return Peak(rates[source], source, *_bound(dtype, device), flops, run)


def _candidates(dtype: torch.dtype, device: str, quick: bool) -> dict[str, tuple[float, Callable[[], object]]]:
    answer: dict[str, tuple[float, Callable[[], object]]] = {}
    sizes = (512,) if quick else (2048,) if device == "cpu" else (4096, 8192)
    for n in sizes:
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        answer[f"matmul {n}"] = (2.0 * n**3, functools.partial(torch.matmul, a, b))
    for batch, channels, size in () if quick else ((4, 128, 56), (8, 256, 28)):
        x = torch.randn(batch, channels, size, size, dtype=dtype, device=device)
        w = torch.randn(channels, channels, 3, 3, dtype=dtype, device=device)
        flops = 2.0 * 9 * channels**2 * size**2 * batch
        answer[f"conv 3x3 {channels}x{size}^2"] = (flops, functools.partial(torch.conv2d, x, w, padding=1))
    return answer


def _fastest(run: Callable[[], object], device: str) -> float:
    best = float("inf")
    with torch.no_grad():
        run()
        for _ in range(_REPEATS):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _bound(dtype: torch.dtype, device: str) -> tuple[str, float | None]:
    if device != "cpu":
        return "no bound computed", None
    isa = torch.backends.cpu.get_cpu_capability().lower().replace("avx2+", "avx2")
    bits = next((bits for name, bits in _VECTOR_BITS.items() if isa.startswith(name)), None)
    megahertz = _nominal_megahertz()
    if bits is None or megahertz is None:
        return "unknown (no vector width or clock could be read)", None
    lanes = bits // (8 * dtype.itemsize)
    threads = torch.get_num_threads()
    gflops = threads * megahertz / 1e3 * _FMA_UNITS * lanes * _FMA_FLOPS
    text = (
        f"{gflops:.0f} GFLOP/s = {threads} threads x {megahertz / 1e3:.2f} GHz x {_FMA_UNITS} FMA units "
        f"x {lanes} lanes x 2, at the clock /proc/cpuinfo names (a turbo clock would raise it)"
    )
    return text, gflops


def _nominal_megahertz() -> float | None:
    try:
        clocks = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return None
    return max(map(float, clocks)) if clocks else None
