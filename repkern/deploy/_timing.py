"""Times of one layer's methods as they are inside a network: weights out of the cache, the input just written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["time_calls"]

_SECONDS = 0.35  # for one layer
_FEWEST, _MOST = 7, 41
_HOPELESS = 3.0  # a method this many times slower than the best one at first sight is not measured further
# More than a core's own cache holds; a network's other layers leave a layer's weights in the shared cache or in memory.
_FLUSH_BYTES_PER_THREAD = 6 << 20
_FLUSH_BYTES_CUDA = 96 << 20


def time_calls(calls: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor) -> dict[str, float]:
    """Seconds of call(x), the least of rounds A B C A B C ...; before each x is written again.

    Between two calls other memory is read, so that no call finds its weights in the core's cache. What else runs on the
    machine only ever adds to a time, so the least is the one that says most about the method.
    """
    cuda = x.is_cuda
    size = _FLUSH_BYTES_CUDA if cuda else _FLUSH_BYTES_PER_THREAD * torch.get_num_threads()
    flush = torch.zeros(size // 4, device=x.device)
    written = x.clone()

    def once(call: Callable[[Tensor], Tensor]) -> float:
        flush.sum()
        written.copy_(x)
        return _cuda_seconds(call, written) if cuda else _host_seconds(call, written)

    for call in calls.values():  # the first call allocates, and chooses algorithms
        call(written)
    first = {name: min(once(call), once(call)) for name, call in calls.items()}
    best = min(first.values())
    kept = {name: call for name, call in calls.items() if first[name] <= _HOPELESS * best}
    start = time.perf_counter()
    for call in kept.values():
        once(call)
    rounds = min(_MOST, max(_FEWEST, math.ceil(_SECONDS / max(time.perf_counter() - start, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in kept}
    for _ in range(rounds):
        for name, call in kept.items():
            samples[name].append(once(call))
    return first | {name: min(values) for name, values in samples.items()}


def _host_seconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    result = call(x)
    seconds = time.perf_counter() - start
    del result
    return seconds


def _cuda_seconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call(x)
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / 1e3, 1e-9)
