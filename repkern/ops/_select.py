"""Which backend runs an op: data and one function."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch

from repkern import _native

__all__ = ["BACKENDS", "available_backends", "choose", "is_automatic", "use_backend", "why_not"]

BACKENDS = ("reference", "cpu", "cuda", "triton", "simt")

# In order of preference, by device type; what is not listed runs the reference.
_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# The device types a backend's kernels can address. None: any.
_DEVICES: dict[str, tuple[str, ...] | None] = {
    "reference": None,
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda", "cpu"),
    "simt": ("cpu",),
}

_logger = logging.getLogger("repkern")


def _from_environment() -> str:
    name = os.environ.get("REPKERN_BACKEND") or "auto"
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"REPKERN_BACKEND names backend {name!r}; choose auto, {', '.join(BACKENDS)}")
    return name


_forced = _from_environment()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_not(backend: str, device_type: str) -> str | None:
    """None when `backend` can run on tensors of `device_type` here, else the reason in words."""
    if backend not in BACKENDS:
        return f"there is no backend of that name (there are: auto, {', '.join(BACKENDS)})"
    devices = _DEVICES[backend]
    if devices is not None and device_type not in devices:
        return f"it runs on {' or '.join(devices)} tensors, got {device_type}"
    if backend in ("cpu", "cuda", "simt"):
        return _native.why_missing(backend)
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if device_type == "cpu" and not _interpreted():
            return "on CPU tensors it needs the interpreter: set TRITON_INTERPRET=1 before importing repkern"
    return None


def available_backends() -> dict[str, str | None]:
    """Every backend -> None when it can run on this machine, else the reason why it cannot.

    "cuda" and "triton" are asked about the GPU when there is one.
    """
    gpu = torch.cuda.is_available()
    answer: dict[str, str | None] = {}
    for backend in BACKENDS:
        device = "cuda" if backend == "cuda" or (backend == "triton" and gpu) else "cpu"
        answer[backend] = why_not(backend, device)
        if backend == "cuda" and answer[backend] is None and not gpu:
            answer[backend] = "no CUDA GPU or driver was found"
    return answer


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the block onto one backend ("auto" restores the choice by device).

    The setting belongs to the process, not the thread: autograd runs backward passes in threads of its own.
    An op that cannot run on the forced backend raises RuntimeError with the reason. Environment: REPKERN_BACKEND.
    """
    global _forced
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; choose auto, {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def is_automatic() -> bool:
    """Whether no backend is forced."""
    return _forced == "auto"


def choose(op: str, device_type: str, written: tuple[str, ...] = BACKENDS) -> str:
    """The backend for `op`, `written` for some, on `device_type`. A forced backend that cannot run: RuntimeError."""
    return _choose(op, device_type, _forced, written)


@functools.cache
def _choose(op: str, device_type: str, forced: str, written: tuple[str, ...]) -> str:
    def obstacle(backend: str) -> str | None:
        known = backend in written or backend not in BACKENDS
        return why_not(backend, device_type) if known else f"this op has it for {', '.join(written)} only"

    if forced != "auto":
        reason = obstacle(forced)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {forced!r} was asked for but cannot run: {reason}")
        return forced
    for backend in _PREFERRED.get(device_type, ("reference",)):
        reason = obstacle(backend)
        if reason is None:
            _logger.info("%s on %s: backend %s", op, device_type, backend)
            return backend
        _logger.info("%s on %s: not backend %s: %s", op, device_type, backend, reason)
    raise AssertionError("the reference runs everywhere")
