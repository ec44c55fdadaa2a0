"""From a file or a wrapped dictionary to one flat dictionary of tensors."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["read_state_dict"]

_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def read_state_dict(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, or of a dictionary, by name.

    Wrappers ("state_dict", "model", ...) are opened and a "module." that all names share is taken off. Files are read
    with weights_only=True, so no code in them runs. FileNotFoundError; ValueError when it is no checkpoint.
    """
    if isinstance(source, Mapping):
        return _flat(source, "the dictionary")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return _flat(_read_file(path), str(path))


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise ValueError(
            f"{path} is not a checkpoint of plain tensors: it is damaged, or holds other objects, which are not loaded "
            f"because that could run code ({_first_line(problem)})"
        ) from problem
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError, ValueError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} is damaged or not a checkpoint ({_first_line(problem)})") from problem


def _first_line(problem: Exception) -> str:
    lines = str(problem).splitlines()
    return lines[0] if lines else type(problem).__name__


def _flat(source: Any, where: str) -> dict[str, Tensor]:
    while isinstance(source, Mapping) and not _all_tensors(source):
        inner = next((source[name] for name in _WRAPPERS if isinstance(source.get(name), Mapping)), None)
        if inner is None:
            break
        source = inner
    if not isinstance(source, Mapping):
        raise ValueError(f"{where} must hold a dictionary of tensors, got {type(source).__name__}")
    if not source:
        raise ValueError(f"{where} holds no tensors")
    foreign = [f"{name} ({type(value).__name__})" for name, value in source.items() if not isinstance(value, Tensor)]
    if foreign or not all(isinstance(name, str) for name in source):
        raise ValueError(f"{where} must hold tensors by name, but also holds: {', '.join(foreign) or 'unnamed ones'}")
    tensors = dict(source)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _all_tensors(source: Mapping[str, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in source.values())
