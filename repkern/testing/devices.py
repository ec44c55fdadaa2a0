"""Where an op can run here: every backend, every instruction set, every device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from repkern import _native
from repkern.ops import _select

__all__ = ["Target", "targets"]

_ISAS = ("scalar", "avx2", "avx512", "amx")


@dataclass(frozen=True)
class Target:
    """A backend on a device, for "cpu" with the instruction set."""

    backend: str
    device: str
    isa: str | None = None

    def __str__(self) -> str:
        return "-".join(
            part for part in (self.backend, self.isa, self.device if self.backend != self.device else None) if part
        )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Force this backend and instruction set."""
        with _select.use_backend(self.backend):
            if self.isa is None:
                yield
                return
            module = _native.load("cpu")
            before = module.build_info()["isa_used"]
            module.set_isa(self.isa)
            try:
                yield
            finally:
                module.set_isa(before)


def targets() -> list[Target]:
    """All that can run on this machine."""
    found: list[Target] = [Target("reference", "cpu")]
    if _select.why_not("cpu", "cpu") is None:
        best = _ISAS.index(_native.load("cpu").build_info()["isa_found"])
        # "amx" has kernels for split weights alone, which direct_conv2d's own tests cover; all else is avx512 there.
        found += [Target("cpu", "cpu", isa) for isa in _ISAS[: best + 1] if isa != "amx"]
    if _select.why_not("simt", "cpu") is None:
        found.append(Target("simt", "cpu"))
    if torch.cuda.is_available():
        found += [
            Target(name, "cuda") for name in ("reference", "cuda", "triton") if _select.why_not(name, "cuda") is None
        ]
    elif _select.why_not("triton", "cpu") is None:
        found.append(Target("triton", "cpu"))
    return found
