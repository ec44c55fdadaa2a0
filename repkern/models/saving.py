"""Our own files: a network, and what is needed to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from repkern.models.checkpoints.reading import read_checkpoint
from repkern.models.files import replaced
from repkern.models.structure import apply_changes, changes_between
from repkern.nn.reparameterize import is_block

if TYPE_CHECKING:
    from repkern.models.network import Network

__all__ = ["describe", "load", "read_description", "save"]

_KEY = "repkern"  # one entry: safetensors writes several in an order that changes from run to run
_VERSION = 1
SUFFIXES = (".safetensors", ".pth")


def describe(model: nn.Module) -> dict[str, Any]:
    """What a file says about a network, as JSON values.

    model_name, block, form ("training" or "deployed"), config (the arguments of create_model), changes (modules that
    differ from what create_model makes, by name), num_parameters, repkern and torch (versions), format.
    TypeError for a model that create_model did not make; ValueError, naming the module, for one that was changed in a
    way that cannot be described.
    """
    import repkern
    from repkern.models.network import Network

    if not isinstance(model, Network):
        raise TypeError(
            f"only networks of repkern.create_model describe themselves, got {type(model).__name__}; write the "
            "state_dict of other models with safetensors or torch.save"
        )
    form = "training" if any(is_block(module) for module in model.modules()) else "deployed"
    described: dict[str, Any] = {
        "format": _VERSION,
        "model_name": model.model_name,
        "block": model.config["block"],
        "form": form,
        "config": _config(model),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "repkern": repkern.__version__,
        "torch": torch.__version__,
    }
    try:
        described["changes"] = changes_between(model, _fresh(described, "meta"))
    except ValueError as problem:
        raise ValueError(
            f"this {model.model_name} cannot be made again from a description: {problem}. "
            "Write its state_dict with safetensors or torch.save"
        ) from problem
    return json.loads(json.dumps(described))


def _config(model: Any) -> dict[str, Any]:
    """The arguments of create_model without the name, and without where the first weights came from."""
    return {key: value for key, value in model.config.items() if key not in ("name", "model_name", "checkpoint")}


def _fresh(described: Mapping[str, Any], device: str) -> Network:
    """The network as create_model makes it, in the form of the description, on `device`."""
    from repkern.models import create_model

    config = dict(described["config"])
    if described["form"] == "deployed":
        config |= {"block": "plain", "block_options": None, "recompute": "none"}
    with torch.device(device):
        return create_model(described["model_name"], **config)


def save(model: nn.Module, path: str | Path) -> None:
    """Write a network of `create_model` to a .safetensors or .pth file that `load` makes it from again.

    The network may be in training form or reparameterized, and its blocks may have been replaced. The file holds the
    weights and statistics and, as metadata, what `describe` gives. It appears whole or not at all. Tensors keep their
    dtype. ValueError for another suffix and as `describe`, TypeError as `describe`.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the file name must end in {' or '.join(SUFFIXES)}, got {path.name!r}")
    text = json.dumps(describe(model), sort_keys=True)
    tensors = _own_tensors(model.state_dict())
    with replaced(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(tensors, str(temporary), metadata={_KEY: text})
        else:
            torch.save({"state_dict": tensors, _KEY: text}, temporary)


def _own_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, none sharing memory with another (safetensors refuses tied weights)."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return tensors


def read_description(path: str | Path) -> dict[str, Any] | None:
    """What `describe` said when the file was written; None for a checkpoint that is not ours.

    FileNotFoundError; ValueError for a file that is no checkpoint, or written by a newer format.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return _description(path, read_checkpoint(path).beside.get(_KEY))
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return _description(path, (file.metadata() or {}).get(_KEY))
    except (SafetensorError, OSError) as problem:
        raise ValueError(f"{path} is damaged or not a safetensors file ({problem})") from problem


def _description(path: Path, text: Any) -> dict[str, Any] | None:
    """The checked metadata of a file; None without any."""
    if text is None:
        return None
    try:
        described = json.loads(text)
        version, form = described["format"], described["form"]
        if not isinstance(described["model_name"], str) or not isinstance(described["config"], dict):
            raise TypeError("model_name must be a string and config a dictionary")
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{path}: its metadata {_KEY!r} is damaged ({problem!r})") from problem
    if version != _VERSION or form not in ("training", "deployed"):
        raise ValueError(
            f"{path} is of format {version!r}, form {form!r}; this repkern reads format {_VERSION}, "
            "form 'training' or 'deployed'"
        )
    return described


def load(path: str | Path, *, device: torch.device | str = "cpu") -> Network:
    """The network that `save` wrote, made again from the file's metadata: same form, same dtypes, in eval mode.

    FileNotFoundError; ValueError for a damaged file, for one that was not written by `save` (released checkpoints:
    `repkern.load_checkpoint(path, model)`), and for one whose model this version does not make the same way.
    """
    path = Path(path)
    described = read_description(path)
    if described is None:
        raise ValueError(
            f"{path} does not say which model it holds (it was not written by repkern.models.save); make the model "
            "and use repkern.load_checkpoint(path, model)"
        )
    tensors = read_checkpoint(path).tensors
    try:
        model = _fresh(described, "cpu")
        apply_changes(model, described.get("changes", {}))
        _take(model, tensors)
    except (ValueError, KeyError, TypeError, RuntimeError) as problem:
        raise ValueError(
            f"{path} (written by repkern {described.get('repkern')}) does not fit {described.get('model_name')!r} as "
            f"this version makes it: {problem}"
        ) from problem
    return model.to(device).eval()


def _take(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load strictly, in the dtypes of the file."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:  # buffers that are not in the file follow
        model.to(dtypes.pop())
    model.load_state_dict(tensors, assign=True)
