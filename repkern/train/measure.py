"""Fair measurements: paired times and peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["median_times", "paired_times", "peak_memory", "resident_bytes", "training_memory", "training_step"]


def paired_times(
    actions: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 3, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every action in each of `rounds` rounds, taken in turns (A B, B A, A B, ...).

    In turns, so that a machine that slows down or a neighbour that wakes up hits all of them alike.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup not negative, got {rounds} and {warmup}")
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warmup + rounds):
        names = list(actions) if turn % 2 == 0 else list(actions)[::-1]
        for name in names:
            _wait(device)
            began = time.perf_counter()
            actions[name]()
            _wait(device)
            if turn >= warmup:
                times[name].append(time.perf_counter() - began)
    return times


def median_times(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each list of seconds."""
    return {name: statistics.median(values) for name, values in times.items()}


def resident_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes that stay between steps: parameters, buffers, gradients present and optimizer state."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if optimizer is not None:
        tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def peak_memory(action: Callable[[], Any], *, device: str = "cpu") -> int:
    """The most bytes torch's allocator had given out at once during `action`, above what it held before.

    On the CPU every allocation and release that torch's profiler saw is added up, so the figure repeats exactly;
    scratch memory that a library (oneDNN) takes from the system itself is not in it. On CUDA the allocator's own count.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _stderr_discarded(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    if not memory:
        raise RuntimeError("torch's profiler reported no allocations")
    held = highest = 0
    for _, size in memory:
        held += size
        highest = max(highest, held)
    return highest


def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
) -> Callable[[], None]:
    """A function that trains `model` one step on this batch: what is timed."""

    def step() -> None:
        loss(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_memory(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None], device: str
) -> int:
    """Weights, optimizer state and the most that one step adds to them, gradients included."""
    step()  # creates the optimizer's state
    return resident_bytes(model, optimizer) + peak_memory(step, device=device)


@contextlib.contextmanager
def _stderr_discarded() -> Iterator[None]:
    """The profiler's C++ code logs its start and stop to file descriptor 2 and has no switch for that."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
