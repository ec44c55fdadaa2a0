"""Comparing a converted checkpoint with a model: what is loaded, and what is said about the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from repkern.models.checkpoints.layout import Conversion, Found
from repkern.models.checkpoints.plain import advice

__all__ = ["LoadReport", "complain", "match"]

_logger = logging.getLogger("repkern")


@dataclass
class LoadReport:
    """What `load_checkpoint` found. Names are in our layout, those of `left_out` in the checkpoint's.

    layouts: of the blocks; beside: entries next to the tensors (optimizer, epoch) that are not read; left_out: tensors
    that have no place in ours; missing, unexpected: names only the model, or only the checkpoint has; mismatched: name
    -> (shape in the checkpoint, shape in the model); counts: norms' counts of batches that older files do not have,
    set to 0; started: blocks that start as a plain convolution of the checkpoint; loaded: names that were loaded, or
    without a model converted.
    """

    layouts: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    counts: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """One line for each name or shape that does not match."""
        lines = [f"missing: {name}" for name in self.missing]
        lines += [f"unexpected: {name}" for name in self.unexpected]
        lines += [f"shape of {name}: {got}, the model has {want}" for name, (got, want) in self.mismatched.items()]
        return lines

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors (layout {', '.join(self.layouts)})"]
        if self.beside:
            lines.append(f"not read: {', '.join(self.beside)}")
        if self.counts:
            lines.append(f"set to 0: {len(self.counts)} counts of batches, which the checkpoint does not have")
        if self.started:
            lines.append(f"{len(self.started)} blocks start as the plain convolutions of the checkpoint")
        lines += [f"left out: {name}" for name in self.left_out]
        return "\n  ".join(lines + self.problems)


def match(
    converted: Conversion, model: nn.Module, report: LoadReport, *, strict: bool, started: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The tensors that fit the model; ValueError that lists all others, or with strict=False a logged warning.

    started: names of blocks that get their values in another way.
    """
    wanted = model.state_dict()
    tensors = dict(converted.tensors)
    for name in wanted:
        norm, _, part = name.rpartition(".")
        if part == "num_batches_tracked" and name not in tensors and f"{norm}.running_mean" in tensors:
            tensors[name] = torch.zeros_like(wanted[name])
            report.counts.append(name)
    for name in _without_place(model, [name for name in tensors if name not in wanted]):
        del tensors[name]
        report.left_out.append(name)
    _check_dtypes(tensors, wanted)
    # Prior filters are in a state_dict only when they are not the default, which a block returns to without them.
    optional = {name: buffer for name, buffer in model.named_buffers() if name.split(".")[-1] == "prior_filter"}
    known = {**optional, **wanted}
    apart = tuple(f"{name}." for name in started)
    absent = [name for name in wanted if name not in tensors and name not in optional]
    report.missing = [name for name in absent if not name.startswith(apart)] if apart else absent
    report.unexpected = [name for name in tensors if name not in known]
    report.mismatched = {
        name: (tuple(tensors[name].shape), tuple(tensor.shape))
        for name, tensor in known.items()
        if name in tensors and tensors[name].shape != tensor.shape
    }
    matched = {name: t for name, t in tensors.items() if name in known and name not in report.mismatched}
    report.loaded = list(matched)
    told = _explanation(converted, wanted)
    told = told or advice(report.unexpected, model)
    complain([*told, *report.problems], model, len(report.problems), strict=strict)
    return matched


def _check_dtypes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError for integers and truth values where weights are wanted: torch would convert them without a word."""
    for name, tensor in tensors.items():
        if name in wanted and wanted[name].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype} in the checkpoint; the model has {wanted[name].dtype}")


def complain(lines: list[str], model: nn.Module, count: int, *, strict: bool) -> None:
    """ValueError, or with strict=False a warning in the log, when there is any problem."""
    if not count:
        return
    listed = "\n  ".join(lines)
    text = f"the checkpoint does not match {type(model).__name__} ({count} problems):\n  {listed}"
    if strict:
        raise ValueError(text)
    _logger.warning("%s", text)


def _without_place(model: nn.Module, names: list[str]) -> list[str]:
    """Of these names, the ones that a features_only network has no layer for, because it stops before them."""
    from repkern.models.network import Network  # networks import this package through repkern.models
    from repkern.models.registry import create_model

    if not names or not isinstance(model, Network) or not model.config.get("features_only"):
        return []
    with torch.device("meta"):
        whole = create_model(**{**model.config, "features_only": False, "out_indices": None}).state_dict()
    return [name for name in names if name in whole]


_MIXED_UP = {
    True: "{} deployed in the checkpoint and in training form here: load it into the plain model, "
    'create_model(..., block="plain") or repkern.reparameterize(model)',
    False: "{} in training form in the checkpoint and deployed here: load it before repkern.reparameterize",
}


def _explanation(converted: Conversion, wanted: Mapping[str, Tensor]) -> list[str]:
    """What a user most likely mixed up: a deployed checkpoint and a model in training form, or the reverse."""
    lines = []
    for deployed, text in _MIXED_UP.items():
        prefixes = [
            block.prefix for block in converted.blocks if block.deployed is deployed and _is_mixed_up(block, wanted)
        ]
        if prefixes:
            first = next(prefix for name in wanted for prefix in prefixes if name.startswith(prefix))
            lines.append(text.format(f"{len(prefixes)} blocks (first {first.rstrip('.') or 'the root'}) are"))
    # Files in our own names have no blocks to convert.
    norms = (_norms(converted.tensors), _norms(wanted))
    if not converted.blocks and any(norms) and not all(norms):
        lines.append(_MIXED_UP[not norms[0]].format("all blocks are"))
    return lines


def _norms(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.endswith("running_mean")}


def _is_mixed_up(block: Found, wanted: Mapping[str, Tensor]) -> bool:
    """Whether the model has norms that a deployed block has not, or a trained block has norms and the model none."""
    here = [name for name in wanted if name.startswith(block.prefix)]
    norms = _norms(here)
    if block.deployed:
        return bool(norms - set(block.names)) and not set(block.names) <= set(here)
    return bool(here) and not norms and bool(_norms(block.names))
