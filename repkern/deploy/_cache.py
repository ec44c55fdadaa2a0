"""What layers took on this machine, kept between processes in one small JSON file."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from repkern import _native
from repkern.models.files import parse_json, replaced

__all__ = ["TimingCache", "cache_file", "hardware"]

_FORMAT = 1
_MAX_ENTRIES = 20_000


def cache_file() -> Path:
    """inference.json in $REPKERN_CACHE_DIR, else in repkern/ of the user's cache folder."""
    own = os.environ.get("REPKERN_CACHE_DIR")
    if own:
        return Path(own) / "inference.json"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "repkern" / "inference.json"


def hardware(device: torch.device) -> str:
    """The processor as timings depend on it: name and instruction set, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    isa = _native.native_build_info().get("isa_used", "no native code")
    return f"{_cpu_name()} {isa} {torch.backends.cpu.get_cpu_capability()} {_build()}"


@functools.lru_cache(maxsize=1)
def _build() -> str:
    """Changes when the kernels do, also without a new version number."""
    if _native.why_missing("cpu") is not None:
        return ""
    file = _native.load("cpu").__file__
    stat = Path(file).stat() if file else None
    return f"{stat.st_size}.{int(stat.st_mtime)}" if stat else ""


@functools.lru_cache(maxsize=1)
def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()


class TimingCache:
    """Key -> {method: seconds}. Reading and writing never fail: a file that is no cache is ignored with a warning.

    enabled=False: everything is measured, nothing is read or written.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._entries = _read() if enabled else {}
        self._fresh: dict[str, dict[str, float]] = {}

    def get(self, key: str) -> dict[str, float]:
        """What is known for the key; empty where nothing is."""
        return self._fresh.get(key) or self._entries.get(key, {})

    def put(self, key: str, seconds: dict[str, float]) -> None:
        """Remember; written by `save`."""
        self._fresh[key] = self.get(key) | seconds

    def save(self) -> None:
        """Add what is new to the file, which other processes may have written meanwhile. The file appears whole."""
        if not self._enabled or not self._fresh:
            return
        try:
            path = cache_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            entries = _read() | self._fresh
            kept = dict(list(entries.items())[-_MAX_ENTRIES:])
            with replaced(path) as temporary:
                temporary.write_text(json.dumps({"format": _FORMAT, "seconds": kept}, indent=0), encoding="utf-8")
        except (OSError, RuntimeError, ValueError) as problem:  # a home that is not known, a name that cannot be
            warnings.warn(
                f"optimize_for_inference: timings could not be kept ({problem}); they are measured again next time",
                UserWarning,
            )


def _read() -> dict[str, dict[str, float]]:
    where = "the timing cache"
    try:
        path = cache_file()
        where = str(path)
        if not path.exists():
            return {}
        content = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise ValueError("it has no format number")
        if content["format"] != _FORMAT:  # of another version of repkern, which is no reason to warn
            return {}
        return {str(key): _checked(entry) for key, entry in content["seconds"].items()}
    # OverflowError: a whole number beyond every float. RuntimeError: no home folder.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as problem:
        warnings.warn(
            f"optimize_for_inference: {where} is no cache of timings ({problem}) and is ignored; it will be replaced",
            UserWarning,
        )
        return {}


def _checked(entry: Any) -> dict[str, float]:
    if not all(type(value) in (int, float) for value in entry.values()):
        raise ValueError("times must be numbers")
    seconds = {str(name): float(value) for name, value in entry.items()}
    if not all(0 < value < float("inf") for value in seconds.values()):
        raise ValueError("times must be positive")
    return seconds
