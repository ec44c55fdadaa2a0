"""What this installation is made of and what it can run on here."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from repkern import _native
from repkern.ops import available_backends

__all__ = ["build_info"]


def build_info() -> dict[str, Any]:
    """Versions, CPU, GPU, native build and backends, as JSON values.

    `backends` maps every backend to None when it can run here, else to the reason why not. `openmp.shared` says
    whether torch and repkern's native code run on one OpenMP runtime (None: no native code, or no way to tell here).
    """
    native = _native.native_build_info()
    return {
        "repkern": _version("repkern"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa_found": native.get("isa_found"),
            "isa_used": native.get("isa_used"),
        },
        "openmp": _openmp("missing" not in native),
        "native": {
            "built": "missing" not in native,
            "missing": native.get("missing"),
            "compiler": native.get("compiler"),
            "sanitized": native.get("sanitized"),
        },
        "cuda": {
            "built": native.get("cuda"),
            "archs": [arch for arch in re.split(r"[;, ]+", native.get("cuda_archs") or "") if arch],
            "torch_cuda": torch.version.cuda,
            "driver": _driver(),
            "gpus": _gpus(),
        },
        "backends": available_backends(),
        "backend_forced": os.environ.get("REPKERN_BACKEND") or None,
    }


def _version(package: str) -> str | None:
    if package == "repkern":
        from repkern import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.lru_cache(maxsize=1)
def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()


def _openmp(native: bool) -> dict[str, Any]:
    """The OpenMP runtimes in this process. Two under torch and repkern would be two pools that fight for the cores.

    Other libraries may bring their own (scikit-learn does); that is theirs.
    """
    try:
        text = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return {"runtimes": [], "shared": None}
    files = {line.split(maxsplit=5)[5] for line in text.splitlines() if len(line.split(maxsplit=5)) == 6}
    runtimes = {Path(file) for file in files if re.match(r"lib(gomp|iomp5|omp)\b.*\.so", Path(file).name)}
    ours = {file for file in runtimes if file.name == "libgomp.so.1"}  # the name our native module is linked with
    torchs = {file for file in runtimes if Path(torch.__file__).parent in file.parents} or ours
    return {
        "runtimes": sorted(file.name for file in runtimes),
        "shared": len(ours) == 1 and ours == torchs if native and ours else None,
    }


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory} for gpu in found
    ]
