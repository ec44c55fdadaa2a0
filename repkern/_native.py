"""The only importer of the native modules, and the texts for when one is absent."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

__all__ = ["load", "native_build_info", "why_missing"]

_MODULES = {"cpu": "repkern._C", "cuda": "repkern._C", "simt": "repkern._C_simt"}


@functools.cache
def _import(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        if name.endswith("_simt"):
            return None, "this is not a test build (install with REPKERN_SIMT=on)"
        return (
            None,
            f"the native module could not be imported ({error}); reinstall repkern with `pip install .`",
        )


def load(backend: str) -> ModuleType:
    """The native module that serves `backend` ("cpu", "cuda" or "simt"); RuntimeError when it is absent."""
    module, problem = _import(_MODULES[backend])
    if module is None:
        raise RuntimeError(f"backend {backend!r} cannot run: {problem}")
    return module


def why_missing(backend: str) -> str | None:
    """None when the native code of `backend` is in this installation, else the reason."""
    module, problem = _import(_MODULES[backend])
    if module is None:
        return problem
    if backend == "cuda" and module.build_info()["cuda"] is None:
        return "this is a CPU-only build (no nvcc when it was built, or REPKERN_CUDA=off)"
    return None


def native_build_info() -> dict[str, Any]:
    """What the native module was built with, and the instruction set in use."""
    module, problem = _import("repkern._C")
    if module is None:
        return {"missing": problem}
    return dict(module.build_info())


def _check_isa_variable() -> None:
    wanted = os.environ.get("REPKERN_ISA")
    module, _ = _import("repkern._C")
    if wanted and module is not None:
        try:
            module.set_isa(wanted)
        except ValueError as error:
            raise ValueError(f"REPKERN_ISA={wanted}: {error}") from None


_check_isa_variable()
