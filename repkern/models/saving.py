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
from repkern.models.seal import notes_of, sealed
from repkern.models.structure import apply_changes, changes_between
from repkern.nn.reparameterize import is_block

if TYPE_CHECKING:
    from repkern.models.network import Network

__all__ = ["describe", "load", "read_description", "save"]

_KEY = "repkern"  # one entry: safetensors writes several in an order that changes from run to run
_VERSION = 1
SUFFIXES = (".safetensors", ".pth")
# What `describe` writes, and of which type.
_FIELDS: dict[str, type] = {
    "format": int,
    "model_name": str,
    "block": str,
    "form": str,
    "config": dict,
    "num_parameters": int,
    "repkern": str,
    "torch": str,
    "changes": dict,
}
_NEEDED = ("format", "model_name", "form", "config")
# The arguments of create_model that files hold: another (checkpoint, name) would make loading open another file.
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "block": (str, type(None)),
    "num_classes": (int,),
    "in_chans": (int,),
    "features_only": (bool,),
    "out_indices": (list, type(None)),
    "output_stride": (int,),
    "width": (int, float),
    "recompute": (str,),
    "block_options": (dict, type(None)),
}
_DEEPEST = 16
_SPARE = 1_000_000  # numbers: buffers that are not in a file
_LARGEST = 2**31  # of a number in a config: no network has so many channels or branches


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
    weights and statistics and, as metadata, what `describe` gives and SHA-256 sums over both. It appears whole or not
    at all. Tensors keep their dtype. ValueError for another suffix and as `describe`, TypeError as `describe`, OSError
    with the reason when the file cannot be written: what was there before is kept.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the file name must end in {' or '.join(SUFFIXES)}, got {path.name!r}")
    described = describe(model)
    tensors = _own_tensors(model.state_dict())
    text = sealed(described, tensors)
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
            metadata = file.metadata() or {}
    except PermissionError as problem:
        raise PermissionError(problem.errno, f"{path} cannot be read: no permission") from problem
    except (SafetensorError, OSError, RuntimeError, OverflowError) as problem:
        raise ValueError(f"{path} is damaged or not a safetensors file ({problem})") from problem
    return _description(path, metadata.get(_KEY))


def _description(path: Path, text: Any) -> dict[str, Any] | None:
    """The checked metadata of a file; None without any."""
    if text is None:
        return None
    try:
        described = notes_of(text)
        missing = [name for name in _NEEDED if name not in described]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        version, form = described["format"], described["form"]
        if version == _VERSION:  # a newer one may have other fields
            _check_fields(described)
    except ValueError as problem:
        raise ValueError(f"{path}: its metadata {_KEY!r} is damaged ({problem})") from problem
    if version != _VERSION or form not in ("training", "deployed"):
        raise ValueError(
            f"{path} is of format {version!r}, form {form!r}; this repkern reads format {_VERSION}, "
            "form 'training' or 'deployed'"
        )
    return described


def _check_fields(described: Mapping[str, Any]) -> None:
    unknown = sorted(set(described) - set(_FIELDS))
    if unknown:
        raise ValueError(f"it has {', '.join(unknown)}, which no version of repkern writes")
    for name, value in described.items():
        wanted = _FIELDS[name]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{name} must be {wanted.__name__}, got {type(value).__name__}")
    for name in ("name", "model_name", "checkpoint"):
        if name in described["config"]:
            raise ValueError(f"config holds {name!r}, which repkern never writes there")
    for name, value in described["config"].items():
        kinds = _ARGUMENTS.get(name)
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            wanted_kinds = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"config: {name} must be {wanted_kinds}, got {type(value).__name__}")
    _check_numbers(described["config"])


def _check_numbers(value: Any, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise ValueError("config is nested too deep")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item, depth + 1)
    elif isinstance(value, int | float) and not abs(value) < _LARGEST:
        raise ValueError(f"config holds the number {value}")


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
        _fits(described, tensors)
        model = _made(described, "cpu")
        _take(model, tensors)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, RecursionError, OverflowError) as problem:
        raise ValueError(
            f"{path} (written by repkern {described.get('repkern')}) does not fit {described.get('model_name')!r} as "
            f"this version makes it: {problem}"
        ) from problem
    return model.to(device).eval()


def _made(described: Mapping[str, Any], device: str) -> Network:
    model = _fresh(described, device)
    with torch.device(device):
        apply_changes(model, described.get("changes", {}))
    return model


def _fits(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """ValueError for a network much larger than the file, whose metadata could ask for any memory, or of other dtypes.

    It is made without memory. Names are for load_state_dict, which knows those of older versions.
    """
    wanted = _made(described, "meta").state_dict()
    sizes = [sum(tensor.numel() for tensor in state.values()) for state in (wanted, tensors)]
    if sizes[0] > 2 * sizes[1] + _SPARE:
        raise ValueError(f"its metadata describes a network of {sizes[0]:,} numbers, it holds {sizes[1]:,}")
    for name, tensor in tensors.items():
        floating = name not in wanted or wanted[name].is_floating_point()
        if tensor.dtype == torch.bool or tensor.is_floating_point() != floating:
            kind = "floating-point numbers" if floating else "integers"
            raise ValueError(f"{name} is of {tensor.dtype}; it must be {kind}")


def _take(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load strictly, in the dtypes of the file."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:  # buffers that are not in the file follow
        model.to(dtypes.pop())
    model.load_state_dict(tensors, assign=True)
