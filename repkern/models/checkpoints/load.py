"""load_checkpoint: read, recognize, convert, load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from repkern.models.checkpoints.orepa import convert_orepa, is_orepa
from repkern.models.checkpoints.reading import read_state_dict

__all__ = ["LAYOUTS", "load_checkpoint"]

_StateDict = dict[str, Tensor]

# name -> (whether a state_dict has this layout, its conversion to our names); the model's own names are a hint.
_FOREIGN: dict[str, tuple[Callable[[_StateDict], bool], Callable[[_StateDict, set[str]], _StateDict]]] = {
    "orepa": (is_orepa, convert_orepa),
}
LAYOUTS = ("auto", "repkern", *_FOREIGN)


def load_checkpoint(
    path_or_dict: str | Path | Mapping[str, Any], model: nn.Module | None = None, *, layout: str = "auto"
) -> _StateDict | nn.Module:
    """Read a checkpoint, bring it to our names, and load it into `model` when one is given.

    path_or_dict: a .safetensors or .pth file, or a dictionary; wrapped ("state_dict", "model") and "module." forms are
    understood, no code in the file is run. layout: "repkern" (names are ours or plain), "orepa" (the released OREPA
    code, training or deployed form), or "auto", which recognizes it by its names.
    Returns the model, or without one the state_dict in our names.
    ValueError for a file that is no checkpoint, and for names or shapes that do not match the model: all are listed,
    and the model is then untouched. FileNotFoundError.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    tensors = read_state_dict(path_or_dict)
    if layout == "auto":
        layout = next((name for name, (fits, _) in _FOREIGN.items() if fits(tensors)), "repkern")
    if layout != "repkern":
        fits, convert = _FOREIGN[layout]
        if not fits(tensors):
            raise ValueError(
                f"the checkpoint has no tensor of layout {layout!r}; its first name is {next(iter(tensors))}"
            )
        tensors = convert(tensors, set() if model is None else set(model.state_dict()))
    if model is None:
        return tensors
    _check_match(tensors, model)
    model.load_state_dict(tensors)
    return model


def _check_match(tensors: _StateDict, model: nn.Module) -> None:
    """ValueError that lists every name and shape that does not match."""
    wanted = model.state_dict()
    # Prior filters are in a state_dict only when they are not the default, which a block returns to without them.
    optional = {name: buffer for name, buffer in model.named_buffers() if name.split(".")[-1] == "prior_filter"}
    problems = [f"missing: {name}" for name in wanted if name not in tensors and name not in optional]
    problems += [f"unexpected: {name}" for name in tensors if name not in wanted and name not in optional]
    for name, tensor in {**optional, **wanted}.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            problems.append(f"shape of {name}: {tuple(tensors[name].shape)}, the model has {tuple(tensor.shape)}")
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"the checkpoint does not match {type(model).__name__} ({len(problems)} problems):\n  {lines}")
