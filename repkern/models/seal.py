"""SHA-256 sums inside model files: over the tensors, and over what a file says about them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repkern.models.files import parse_json

__all__ = ["SEALED", "WEIGHTS", "check_seal", "notes_of", "sealed"]

#: The key of a file that holds weights and no description.
WEIGHTS = "repkern.weights"
#: Keys of a file's metadata under which we write JSON with sums in it.
SEALED = ("repkern", "repkern.scales", "repkern.digits", WEIGHTS)
_SUMS = "sha256"
_CHUNK = 1 << 26


def sealed(notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """`notes` (JSON values) as the text that a file keeps beside `tensors`: with both sums, in a fixed order."""
    kept = json.loads(json.dumps(dict(notes)))
    sums = {"notes": _notes_sum(kept), "tensors": _tensors_sum(tensors)}
    return json.dumps({**kept, _SUMS: sums}, sort_keys=True)


def notes_of(text: Any) -> dict[str, Any]:
    """The notes in such a text, without the sums; a text without sums (of an older version) is taken as it is.

    ValueError when it is no JSON object, or another one than was written.
    """
    notes, _ = _parts(text)
    return notes


def check_seal(text: Any, tensors: Mapping[str, Any]) -> None:
    """ValueError unless notes and tensors are those that were written. Without sums nothing is checked."""
    _, sums = _parts(text)
    if sums is not None and sums.get("tensors") != _tensors_sum(tensors):
        raise ValueError("its tensors are not those that were written (the SHA-256 sum differs)")


def _parts(text: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if not isinstance(text, str):
        raise ValueError(f"its metadata must be JSON, got {type(text).__name__}")
    notes = parse_json(text)
    if not isinstance(notes, dict):
        raise ValueError(f"its metadata must be a JSON object, got {type(notes).__name__}")
    if _SUMS not in notes:
        return notes, None
    sums = notes.pop(_SUMS)
    if not isinstance(sums, dict) or set(sums) != {"notes", "tensors"} or sums["notes"] != _notes_sum(notes):
        raise ValueError("its metadata is not what was written (the SHA-256 sum differs)")
    return notes, sums


def _notes_sum(notes: Mapping[str, Any]) -> str:
    try:
        return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _tensors_sum(tensors: Mapping[str, Any]) -> str:
    """Over name, dtype, shape and bytes of every tensor, sorted by name, whatever their order in the file."""
    digest = hashlib.sha256()
    for name in sorted(tensors, key=str):
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"{name} is no plain tensor")
        # With lengths, so that no two lists of tensors give the same bytes.
        head = json.dumps([str(name), str(tensor.dtype), list(tensor.shape)])
        digest.update(f"{len(head)}:{head}".encode())
        _update(digest, tensor)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    if not math.prod(tensor.shape):
        return
    data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
    for start in range(0, len(data), _CHUNK):
        digest.update(data[start : start + _CHUNK].numpy().data)
