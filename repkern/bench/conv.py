"""3x3 convolutions: winograd_conv2d with prepared weights against torch.conv2d, each in both memory formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repkern.bench.registry import ConvCase
from repkern.bench.results import Row
from repkern.bench.timing import Workload, measure_pairs, quantiles, ratio_of_pairs, strict_fp32
from repkern.ops import use_backend, winograd_conv2d_packed, winograd_transform_weight

__all__ = ["FORMATS", "ConvOptions", "run_conv"]

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Relative L2 error against float64 that is still right, by tile: float32, and what half precision maps lose.
_ALLOWED = {2: 1e-6, 4: 3e-6, 6: 1e-5}
_ALLOWED_HALF = {2: 6e-3, 4: 6e-3, 6: 6e-3}


@dataclass(frozen=True)
class ConvOptions:
    """What to measure and how long."""

    backend: str = "cpu"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    tiles: Sequence[int] = (2, 4)
    pairs: int = 15
    min_sample_seconds: float = 0.01
    max_seconds: float = 6.0


def run_conv(cases: Sequence[ConvCase], options: ConvOptions) -> Iterator[Row]:
    """One row per case, tile and memory format; the baseline is the faster format of torch.conv2d in the same run.

    RuntimeError when a result is wrong: nothing wrong is timed.
    """
    with torch.inference_mode(), strict_fp32(), use_backend(options.backend):
        for case in cases:
            yield from _run_case(case, options)


def _run_case(case: ConvCase, options: ConvOptions) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=generator, dtype=torch.float64).relu()
    weight = torch.randn(case.k, case.c, 3, 3, generator=generator, dtype=torch.float64) / (9 * case.c) ** 0.5
    maps = {name: x.to(options.device, options.dtype, memory_format=form) for name, form in FORMATS.items()}
    kernel = weight.to(options.device, options.dtype)
    exact = torch.conv2d(maps["nchw"][:1].double().cpu(), kernel.double().cpu(), padding=1)
    ours = {}
    for tile in options.tiles:
        packed = winograd_transform_weight(kernel, tile)
        for name, given in maps.items():
            call = _ours(given, packed, case.k, tile)
            _require_right(call(), exact, tile, options.dtype, f"{case.name}, F{tile}, {name}")
            ours[f"F{tile} {name}"] = call
    torchs = {f"torch {name}": _torch(maps[name], kernel.to(memory_format=form)) for name, form in FORMATS.items()}
    work = {name: _workload(call) for name, call in (ours | torchs).items()}
    samples = measure_pairs(
        work,
        pairs=options.pairs,
        min_sample_seconds=options.min_sample_seconds,
        max_seconds=options.max_seconds,
        device=options.device,
    )
    best = min(torchs, key=lambda name: quantiles(samples[name]).p50)
    for name in ours:
        yield _row(case, options, name, samples[name], best, samples[best])


def _workload(call: Callable[[], Tensor]) -> Workload:
    return Workload(lambda _: call())


def _ours(x: Tensor, packed: Tensor, out_channels: int, tile: int) -> Callable[[], Tensor]:
    return lambda: winograd_conv2d_packed(x, packed, out_channels=out_channels, tile=tile)


def _torch(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.conv2d(x, weight, padding=1)


def _require_right(got: Tensor, exact: Tensor, tile: int, dtype: torch.dtype, what: str) -> None:
    error = float((got[:1].double().cpu() - exact).norm() / exact.norm())
    allowed = (_ALLOWED if dtype in (torch.float32, torch.float64) else _ALLOWED_HALF)[tile]
    if not error <= allowed:
        raise RuntimeError(f"{what}: relative error {error:.2e}, allowed {allowed:.0e}; not timed")


def _row(case: ConvCase, options: ConvOptions, name: str, ours: list[float], best: str, baseline: list[float]) -> Row:
    time, ratio = quantiles(ours), ratio_of_pairs(baseline, ours)
    return Row(
        kind="conv", op="winograd_conv2d", case=case.name, what=name, dtype=str(options.dtype).removeprefix("torch."),
        device=options.device, mode="eager", backend=options.backend, ms_p20=time.p20 * 1e3, ms=time.p50 * 1e3,
        ms_p80=time.p80 * 1e3, baseline=best, baseline_ms=quantiles(baseline).p50 * 1e3, ratio_p20=ratio.p20,
        ratio=ratio.p50, ratio_p80=ratio.p80, pairs=len(ours), gflops=case.flops() / time.p50 / 1e9,
    )  # fmt: skip
