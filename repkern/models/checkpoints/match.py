"""Comparing a converted checkpoint with a model: what is loaded, and what is said about the rest."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor, nn

from repkern.models.checkpoints.layout import Conversion

__all__ = ["LoadReport", "match"]

_logger = logging.getLogger("repkern")
_COUNT = "num_batches_tracked"


@dataclass
class LoadReport:
    """What `load_checkpoint` found. Names are in our layout, those of `left_out` in the checkpoint's.

    layouts: of the blocks; beside: entries next to the tensors (optimizer, epoch) that are not read; left_out: tensors
    that have no place in ours; missing, unexpected: names only the model, or only the checkpoint has; mismatched: name
    -> (shape in the checkpoint, shape in the model); loaded: names that were loaded.
    """

    layouts: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """One line for each name or shape that does not match."""
        lines = [f"missing: {name}" for name in self.missing]
        lines += [f"unexpected: {name}" for name in self.unexpected]
        lines += [f"shape of {name}: {got}, the model has {want}" for name, (got, want) in self.mismatched.items()]
        return lines

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors (layout {', '.join(self.layouts)})"]
        if self.beside:
            lines.append(f"not read: {', '.join(self.beside)}")
        lines += [f"left out: {name}" for name in self.left_out]
        return "\n  ".join(lines + self.problems)


def match(converted: Conversion, model: nn.Module, report: LoadReport, *, strict: bool) -> dict[str, Tensor]:
    """The tensors that fit the model; ValueError that lists all others, or with strict=False a logged warning."""
    tensors = converted.tensors
    wanted = model.state_dict()
    # Prior filters are in a state_dict only when they are not the default, which a block returns to without them.
    optional = {name: buffer for name, buffer in model.named_buffers() if name.split(".")[-1] == "prior_filter"}
    known = {**optional, **wanted}
    report.missing = [name for name in wanted if name not in tensors and name not in optional]
    report.unexpected = [name for name in tensors if name not in known]
    report.mismatched = {
        name: (tuple(tensors[name].shape), tuple(tensor.shape))
        for name, tensor in known.items()
        if name in tensors and tensors[name].shape != tensor.shape
    }
    matched = {name: t for name, t in tensors.items() if name in known and name not in report.mismatched}
    problems = report.problems
    report.loaded = list(matched)
    if not problems:
        return matched
    lines = "\n  ".join([*_explanation(converted, wanted), *problems])
    text = f"the checkpoint does not match {type(model).__name__} ({len(problems)} problems):\n  {lines}"
    if strict:
        raise ValueError(text)
    _logger.warning("%s", text)
    return matched


def _explanation(converted: Conversion, wanted: dict[str, Tensor]) -> list[str]:
    return []
