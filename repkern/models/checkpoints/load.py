"""load_checkpoint: read, recognize, convert, load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from repkern.models.checkpoints.dyrep import DYREP
from repkern.models.checkpoints.grow import Growth, compare_graph
from repkern.models.checkpoints.layout import Conversion, Layout, convert_blocks, fold_norms
from repkern.models.checkpoints.match import LoadReport, match
from repkern.models.checkpoints.networks import rename_network
from repkern.models.checkpoints.plain import plain_names, start_blocks, take_plain
from repkern.models.checkpoints.reading import Checkpoint, read_checkpoint
from repkern.models.checkpoints.registry import LAYOUTS, RELEASED, SCALES
from repkern.models.checkpoints.scales import checked_scales
from repkern.nn.block import rename_earlier

__all__ = ["LAYOUTS", "load_checkpoint"]

_logger = logging.getLogger("repkern")
_StateDict = dict[str, Tensor]
_DESCRIPTION = "repkern"  # what repkern.models.save writes beside the tensors; `repkern.models.load` reads it
_LISTED = 8


def load_checkpoint(
    path_or_dict: str | Path | Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    layout: str = "auto",
    strict: bool = True,
    ema: bool = False,
    report: LoadReport | None = None,
) -> _StateDict | nn.Module:
    """Read a checkpoint, bring it to our names, and load it into `model` when one is given.

    path_or_dict: a .safetensors or .pth file, or a dictionary; wrapped ("state_dict", "model") and "module." forms are
    understood, no code in the file is run. ema: take the averaged weights that lie beside the others.
    layout: one of `LAYOUTS`. "repkern" means that the names are ours or plain; "auto" recognizes blocks of every
    released layout by their names, under any prefix, and networks whose layers we name otherwise.
    Weights of a plain network for a model whose convolutions `replace_convs` made blocks: every block starts as its
    convolution (`set_equivalent_kernel_bias`, exact in eval mode), as with replace_convs(preserve=True).
    strict: names or shapes that do not match the model are an error. With False, what matches is loaded and the rest
    is logged as a warning. report: filled with what was found, converted, left out and not matched.
    Returns the model, or without one the state_dict in our names. With layout="repopt_scales" the scales of a
    hyper-search by name, checked against the model if there is one, which stays as it is.
    ValueError for a file that is no checkpoint, and for names or shapes that do not match the model: all are listed,
    and the model is then untouched. FileNotFoundError.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    report = LoadReport() if report is None else report
    checkpoint = read_checkpoint(path_or_dict, ema=ema)
    report.beside = sorted(name for name in checkpoint.beside if name != _DESCRIPTION)
    if model is not None and layout != SCALES.name:
        return _load(checkpoint, model, layout, report, strict=strict)
    inner = None if model is None else _unwrapped(model)
    converted = _convert(checkpoint, inner, layout, report)
    if layout == SCALES.name:
        converted.tensors = checked_scales(converted, inner, report, strict=strict)
    report.loaded = list(converted.tensors)
    _tell(report, converted.left_out)
    return converted.tensors


def _load(checkpoint: Checkpoint, model: nn.Module, layout: str, report: LoadReport, *, strict: bool) -> nn.Module:
    inner = _unwrapped(model)
    growth = _grown(checkpoint, inner, layout)
    target = inner if growth is None else growth.model
    # The weight of a plain convolution is not what an earlier version of a block called so.
    plain = plain_names(checkpoint.tensors, target)
    others = rename_earlier({name: t for name, t in checkpoint.tensors.items() if name not in plain}, target)
    checkpoint = checkpoint._replace(tensors={**others, **plain})
    try:
        if growth is not None and growth.changed and inner is not model:
            raise ValueError(
                f"the checkpoint changes layers of the model (DyRep): load it before {type(model).__name__} wraps it"
            )
        converted = _convert(checkpoint, target, layout, report)
        starts = take_plain(converted, target)
        matched = match(converted, target, report, strict=strict, started=[start.name for start in starts])
        start_blocks(starts)
        report.started = [start.name for start in starts]
        report.loaded += [name for start in starts for name in start.names]
        target.load_state_dict(matched, strict=False)
    except BaseException:
        if growth is not None:
            growth.undo()
        raise
    if growth is not None:
        growth.finish()
    _tell(report, converted.left_out)
    return target if inner is model else model


def _tell(report: LoadReport, left_out: list[str]) -> None:
    """Log the whole report, and tensors that have no place in ours so that nobody misses it."""
    if left_out:
        listed = ", ".join(left_out[:_LISTED]) + (", ..." if len(left_out) > _LISTED else "")
        _logger.warning("load_checkpoint: %d tensors have no place here and are left out: %s", len(left_out), listed)
    _logger.info("load_checkpoint: %s", report)


def _grown(checkpoint: Checkpoint, model: nn.Module, layout: str) -> Growth | None:
    """The model with the blocks that DyRep grew, for a checkpoint that has any."""
    if layout not in ("auto", DYREP.name) or not ("dyrep" in checkpoint.beside or DYREP.fits(checkpoint.tensors)):
        return None
    if "dyrep" in checkpoint.beside:
        compare_graph(checkpoint.tensors, checkpoint.beside["dyrep"])
    tensors, _ = rename_network(checkpoint.tensors, _modules(model))
    return Growth(model, tensors)


def _modules(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules()}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _convert(checkpoint: Checkpoint, model: nn.Module | None, layout: str, report: LoadReport) -> Conversion:
    tensors = checkpoint.tensors
    names = set() if model is None else set(model.state_dict())
    if layout == "repkern" or (layout == "auto" and names and names == set(tensors)):
        report.layouts = ["repkern"]
        return Conversion(tensors)
    layouts = _layouts(tensors, model, layout)
    certain = layouts != [SCALES]
    renamed, left_out = rename_network(tensors, None if model is None else _modules(model), certain=certain)
    converted = convert_blocks(renamed, layouts, names)
    if any(block.deployed for block in converted.blocks):
        fold_norms(converted, names)
    converted.left_out += left_out
    found = {block.layout for block in converted.blocks} - {""}
    report.layouts = sorted(found) or ["repkern" if layout == "auto" else layout]
    report.left_out = list(converted.left_out)
    return converted


def _layouts(tensors: _StateDict, model: nn.Module | None, layout: str) -> list[Layout]:
    """The layouts whose blocks are converted: that one, or all."""
    if layout != "auto":
        asked = SCALES if layout == SCALES.name else RELEASED[layout]
        if not asked.fits(tensors, certain=False):
            first = next(iter(tensors))
            raise ValueError(f"the checkpoint has no tensor of layout {layout!r}; its first name is {first}")
        return [asked]
    if SCALES.fits(tensors) and not any(released.fits(tensors) for released in RELEASED.values()):
        if model is not None:
            raise ValueError(
                f"the checkpoint holds only the scales of a hyper-search: layout={SCALES.name!r} returns them, checked "
                "against the model, which they leave as it is"
            )
        return [SCALES]
    return list(RELEASED.values())
