"""From a file or a wrapped dictionary to one flat dictionary of tensors."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from repkern.models.seal import SEALED, check_seal
from repkern.models.zip_sums import check_records

__all__ = ["Checkpoint", "read_checkpoint", "read_state_dict"]

_WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net", "network")
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_PREFIX = re.compile(r"module\.|_orig_mod\.")  # of DistributedDataParallel and torch.compile
_BEGINNING = re.compile(r"(?:module\.|_orig_mod\.)*")
_DEEPEST = 32  # wrappers in wrappers


class Checkpoint(NamedTuple):
    """The tensors of a checkpoint by name, and the entries that lay beside them (optimizer, epoch, ...)."""

    tensors: dict[str, Tensor]
    beside: dict[str, Any]


def read_checkpoint(source: str | Path | Mapping[str, Any], *, ema: bool = False) -> Checkpoint:
    """The content of a .safetensors or .pth file, or of a dictionary.

    Wrappers ("state_dict", "model", ...) are opened and a "module." that all names share is taken off. ema: of the
    wrappers, the one with averaged weights. Files are read with weights_only=True, so no code in them runs; sums that
    are in a file (SHA-256 in those of repkern, CRC-32 in those of torch.save) are checked.
    FileNotFoundError; ValueError when it is no checkpoint, is damaged, or has no averaged weights.
    """
    if isinstance(source, Mapping):
        return _flat(source, "the dictionary", ema)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a checkpoint must be a path or a dictionary, got {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        what = ", which is a folder" if path.is_dir() else ""
        raise FileNotFoundError(f"no checkpoint at {path}{what}")
    return _flat(_read_file(path), str(path), ema)


def read_state_dict(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that `read_checkpoint` finds."""
    return read_checkpoint(source).tensors


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        check_records(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            _check_seals(content, content["state_dict"])
        return content
    except pickle.UnpicklingError as problem:
        named = re.search(r"GLOBAL (\S+)", str(problem))
        what = f"a {named[1]}" if named else _first_line(problem)
        raise ValueError(
            f"{path} is not a checkpoint of plain tensors: it is damaged, or holds other objects, which are not loaded "
            f"because that could run code ({what}). Where the program that wrote it runs, save the tensors alone."
        ) from problem
    except PermissionError as problem:
        raise PermissionError(problem.errno, f"{path} cannot be read: no permission") from problem
    except Exception as problem:  # torch.load has no common type for what can be wrong with a file
        raise ValueError(f"{path} is damaged or not a checkpoint ({_first_line(problem)})") from problem


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 not a dict
    _check_seals(metadata, tensors)
    return tensors


def _check_seals(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    for key in SEALED:
        if key in metadata:
            check_seal(metadata[key], tensors)


def _aligned(tensor: Tensor) -> Tensor:
    """In memory that starts at a cache line, as torch's own: safetensors packs tensors as they come.

    Weights across lines are slower, and some BLAS libraries round differently there.
    """
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


def _first_line(problem: Exception) -> str:
    lines = str(problem).splitlines()
    if isinstance(problem, KeyError):  # its text is the key alone
        return f"{type(problem).__name__} {lines[0]}"
    return lines[0] if lines else type(problem).__name__


def _flat(source: Any, where: str, ema: bool) -> Checkpoint:
    beside: dict[str, Any] = {}
    averaged = False
    opened: list[int] = []
    while isinstance(source, Mapping) and not _all_tensors(source):
        if id(source) in opened or len(opened) == _DEEPEST:
            what = "contains itself" if id(source) in opened else f"has more than {_DEEPEST} wrappers inside each other"
            raise ValueError(f"{where} is no checkpoint: it {what}")
        opened.append(id(source))
        name = next((name for name in _AVERAGED if ema and isinstance(source.get(name), Mapping)), None)
        averaged = averaged or name is not None
        name = name or next((name for name in _WRAPPERS if isinstance(source.get(name), Mapping)), None)
        if name is None:
            break
        beside |= {str(other): value for other, value in source.items() if other != name}
        source = source[name]
    tensors = _plain_tensors(source, where)
    if ema and not averaged:
        raise ValueError(f"{where} holds no averaged weights ({', '.join(_AVERAGED)}); use ema=False")
    return Checkpoint(_without_prefix(tensors), beside)


def _plain_tensors(source: Any, where: str) -> dict[str, Tensor]:
    if not isinstance(source, Mapping):
        raise ValueError(f"{where} must hold a dictionary of tensors, got {type(source).__name__}")
    if not source:
        raise ValueError(f"{where} holds no tensors")
    foreign = [f"{name} ({type(value).__name__})" for name, value in source.items() if not isinstance(value, Tensor)]
    if foreign or not all(isinstance(name, str) for name in source):
        raise ValueError(f"{where} must hold tensors by name, but also holds: {', '.join(foreign) or 'unnamed ones'}")
    for name, tensor in source.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            raise ValueError(f"{where}: {name} is of {kind}; weights are dense real numbers")
    return dict(source)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the "module." and "_orig_mod." that all names begin with."""
    first, *others = [_PREFIX.findall(_BEGINNING.match(name)[0]) for name in tensors]  # type: ignore[index]
    shared = "".join(first[: min([len(first), *(_alike(first, other) for other in others)])])
    return {name[len(shared) :]: tensor for name, tensor in tensors.items()} if shared else tensors


def _alike(first: list[str], other: list[str]) -> int:
    """How many items the two have in common at their beginning."""
    pairs = zip(first, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(other)))


def _all_tensors(source: Mapping[str, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in source.values())
