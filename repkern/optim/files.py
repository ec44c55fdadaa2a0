"""Files of scales: safetensors of ours, and what the authors released."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from repkern.models.checkpoints import load_checkpoint
from repkern.models.checkpoints.reading import read_state_dict
from repkern.models.checkpoints.scales import SCALE_NAMES, named_as_in
from repkern.models.files import replaced
from repkern.models.seal import sealed
from repkern.optim.scales import by_layer, check_scales, unwrapped

__all__ = ["load_scales", "save_scales"]

_KEY = "repkern.scales"


def save_scales(scales: Mapping[str, Tensor], path: str | Path, **notes: Any) -> None:
    """Write scales by name to a .safetensors file, whole or not at all; `notes` (JSON values) go to its metadata.

    The metadata has SHA-256 sums, which `load_scales` checks.
    ValueError for names that are no scales, values that are not finite, and another suffix; OSError with the reason
    when the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"scales are written as .safetensors, got {path}")
    by_layer(scales)
    _check_real(scales)
    broken = [name for name, scale in scales.items() if not torch.isfinite(scale).all()]
    if broken:
        raise ValueError(f"{broken[0]} is not finite: the search diverged")
    tensors = {name: scale.detach().cpu().contiguous() for name, scale in scales.items()}
    with replaced(path) as temporary:
        save_file(tensors, temporary, metadata={_KEY: sealed(notes, tensors)})


def load_scales(path: str | Path, model: nn.Module | None = None, *, strict: bool = True) -> dict[str, Tensor]:
    """Read scales [Co] by name: a file of `save_scales`, a released *-scales.pth, or a whole hyper-search checkpoint.

    No code in the file is run. Released names become ours. model: the network they are for, compared with them (see
    `check_scales`) and not changed; they get the names of its layers. None: no comparison.
    FileNotFoundError; ValueError for a file that holds no scales, and for those of another network, which lists the
    first mismatches.
    """
    inner = None if model is None else unwrapped(model)
    tensors = read_state_dict(path)
    # In a state_dict of ours a scale is the `weight` of the module that bears its name.
    named = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    scales = {name: tensor for name, tensor in named.items() if name.rpartition(".")[2] in SCALE_NAMES}
    if not scales:
        found = load_checkpoint(tensors, inner, layout="repopt_scales", strict=strict)
        assert isinstance(found, dict)
        scales = found
    _check_real(scales)
    by_layer(scales)
    if inner is None:
        return scales
    check_scales(scales, inner, strict=strict)
    return named_as_in(inner, scales)


def _check_real(scales: Mapping[str, Tensor]) -> None:
    for name, scale in scales.items():
        if not scale.is_floating_point():
            raise ValueError(f"{name} is of {scale.dtype}; scales are real floating-point numbers")
