"""`model.replace` of a recipe: convolutions made blocks, in networks of plain convolutions and of conv_bn blocks."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import cast

from torch import nn

import repkern.nn
from repkern.nn import ConvNormAct, replace_convs
from repkern.nn.convert import ReplaceReport
from repkern.train.recipe import ReplaceRecipe

__all__ = ["replaced"]


def replaced(model: nn.Module, wanted: ReplaceRecipe) -> nn.Module:
    """`model` with the convolutions that `wanted` picks as its blocks.

    Of the networks of `create_model`, those inside of `ConvNormAct` (block "conv_bn") can be picked too: the norm and
    the activation stay. ValueError for a class, an option or patterns that are not there, and for blocks that replace
    nothing.
    """
    block, patterns = _block(wanted), wanted.where

    def picked(name: str) -> bool:
        return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)

    inside = _inside_blocks(model, block, wanted.preserve, picked)
    report = ReplaceReport()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "replace_convs: nothing to replace", UserWarning)
        model = replace_convs(
            model, block, preserve=wanted.preserve, where=lambda name, conv: picked(name), report=report
        )
    if not inside and not report.replaced:
        left = "; ".join(f"{name}: {reason}" for name, reason in list(report.skipped.items())[:4])
        raise ValueError(
            f"model.replace: nothing to replace by {wanted.block} in {type(model).__name__}"
            f"{f' where {list(patterns)}' if patterns else ''}: {left or 'it has no convolutions outside of blocks'}"
        )
    return model


def _block(wanted: ReplaceRecipe) -> Callable[..., nn.Module]:
    block = getattr(repkern.nn, wanted.block, None)
    if not isinstance(block, type) or not issubclass(block, nn.Module):
        raise ValueError(f"model.replace.block: repkern.nn has no class {wanted.block!r}")
    known = set(inspect.signature(block).parameters) - set(inspect.signature(nn.Conv2d).parameters)
    unknown = sorted(set(wanted.options) - known)
    if unknown:
        raise ValueError(
            f"model.replace.options: {wanted.block} has no option {', '.join(unknown)}; it has "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    return functools.partial(block, **wanted.options) if wanted.options else block


def _inside_blocks(
    model: nn.Module, block: Callable[..., nn.Module], preserve: bool, picked: Callable[[str], bool]
) -> Sequence[str]:
    """Names of the convolutions of ConvNormAct that were replaced."""
    if getattr(getattr(block, "func", block), "has_norm", False):
        return []  # the norm would be there twice
    names = []
    for name, module in list(model.named_modules()):
        path = f"{name}.conv" if name else "conv"
        if type(module) is ConvNormAct and isinstance(module.conv, nn.Conv2d) and picked(path):
            module.conv = cast(nn.Conv2d, replace_convs(module.conv, block, preserve=preserve))
            names.append(path)
    return names
