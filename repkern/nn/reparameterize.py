"""reparameterize: every block of a model -> the plain convolution it computes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn._surgery import copied_model, replace_modules
from repkern.nn.block import RepBlock
from repkern.nn.group import ungroup_squeeze
from repkern.nn.verify import Example, Reference, ReparameterizeReport, check_in_float64, check_same_function

__all__ = ["is_block", "reparameterize"]

_Pick = Callable[[str, nn.Module], nn.Module | None]

_logger = logging.getLogger("repkern")
_SHOWN = 8


def is_block(module: nn.Module) -> bool:
    """Whether `reparameterize` converts this module: a `RepBlock`, or another class of ours with a `fuse()`.

    Foreign modules may have a `fuse` that means something else.
    """
    ours = (kind for kind in type(module).__mro__ if "fuse" in vars(kind))
    return isinstance(module, RepBlock) or any(kind.__module__.partition(".")[0] == "repkern" for kind in ours)


def reparameterize(
    model: nn.Module,
    *,
    inplace: bool = False,
    verify: Example | None = None,
    report: ReparameterizeReport | None = None,
) -> nn.Module:
    """Replace every block by its plain module (the root included) and return the model.

    Without `inplace` the model given stays as it is and a copy is returned. A block that sits in several places is
    converted once and its plain module sits in all of them; hooks, training flag, dtype, device and requires_grad are
    kept. Idempotent: a model without blocks comes back unchanged.

    verify: example input, a tensor, a tuple of arguments or a dictionary of keyword arguments. These and the outputs
    can be in lists, dictionaries, NamedTuples and dataclasses. The model is run before and after, in eval mode without
    gradients, in its own precision and, where it runs there, converted and compared in float64 as well. ValueError is
    raised, with the largest difference, where it is, the bound and the first block that differs, when the two disagree
    by more than rounding; also for parameters, statistics (by name) or outputs that are NaN or infinite.
    report: filled with what was converted and, with `verify`, the largest absolute and relative difference of every
    output and block; also when ValueError is raised. What it prints as is logged as well. Comparing the blocks takes
    longer than all else, so it is done for a report, or to name the block in the error.

    UserWarning in train mode (the plain model uses running statistics, so outputs differ from those of training), and
    for BatchNorms inside blocks whose statistics are untouched or not finite. ValueError for those that keep none.
    """
    with_blocks = report is not None
    report = ReparameterizeReport() if report is None else report
    for text in _doubts_about(model):
        report.warnings.append(text)
        warnings.warn(f"reparameterize: {text}", UserWarning, stacklevel=2)
    try:
        if not inplace:
            model = copied_model(model)
        reference = None if verify is None else Reference(model, verify)
        if reference is not None:
            reference.require_finite()
        ungroup_squeeze(model)
        model, block_of = _replace_blocks(model, report)
        if reference is not None:
            check_same_function(model, reference, block_of, report, with_blocks=with_blocks)
            if reference.double is not None:
                double, block_of = _replace_blocks(ungroup_squeeze(reference.double), ReparameterizeReport())
                check_in_float64(double, reference, block_of, report)
    except ValueError as problem:
        raise ValueError(f"reparameterize: {problem}") from problem
    _logger.info("reparameterize: %s", report)
    return model


def _replace_blocks(model: nn.Module, report: ReparameterizeReport) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """The model with plain modules, and plain module -> the block it came from."""
    block_of: dict[nn.Module, nn.Module] = {}

    def pick(name: str, module: nn.Module) -> nn.Module | None:
        if not is_block(module):
            return None
        fuse: Callable[[], nn.Module] = getattr(module, "fuse")  # noqa: B009 nn.Module declares no such method
        try:
            plain = fuse()
        except ValueError as problem:
            raise ValueError(f"block {name or '(root)'}: {problem}") from problem
        report.converted[name] = type(module).__name__
        # What a block keeps as it is (an activation, a gate) may hold a block itself.
        for child, part in list(plain.named_children()):
            plain._modules[child] = replace_modules(part, _under(f"{name}.{child}" if name else child, pick))
        block_of[plain] = module
        return plain

    return replace_modules(model, pick), block_of


def _under(prefix: str, pick: _Pick) -> _Pick:
    """`pick` with names that start at the root of the model."""
    return lambda name, module: pick(f"{prefix}.{name}" if name else prefix, module)


def _norms_in_blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """BatchNorms, and other modules with running statistics."""
    seen: set[int] = set()
    for prefix, block in model.named_modules():
        if is_block(block):
            for name, norm in block.named_modules(prefix=prefix):
                statistics = [getattr(norm, part, None) for part in ("running_mean", "running_var")]
                if id(norm) not in seen and all(isinstance(tensor, Tensor) for tensor in statistics):
                    seen.add(id(norm))
                    yield name, norm


def _doubts_about(model: nn.Module) -> Iterator[str]:
    """Why the plain model may not be what the user expects, in words."""
    if any(is_block(module) and module.training for module in model.modules()):
        yield (
            "the model is in train mode. The plain model uses the running statistics of its BatchNorms, as the model "
            "does after model.eval(); compare the two in eval mode."
        )
    untouched, broken = [], []
    for name, norm in _norms_in_blocks(model):
        if not (torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()):
            broken.append(name)
        elif getattr(norm, "num_batches_tracked", None) is not None and _is_fresh(norm):
            untouched.append(name)
    if untouched:
        yield (
            "these BatchNorms have never seen data (mean 0, variance 1), so what is folded is not what training would "
            f"give: {_some(untouched)}"
        )
    if broken:
        yield f"these BatchNorms have NaN or infinite statistics: {_some(broken)}"


def _some(names: list[str]) -> str:
    """The names, or the first of many and their number: a warning is read, a page of names is not."""
    return (
        ", ".join(names) if len(names) <= _SHOWN + 1 else f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"
    )


def _is_fresh(norm: Any) -> bool:
    return int(norm.num_batches_tracked) == 0 and not norm.running_mean.any() and bool((norm.running_var == 1).all())
