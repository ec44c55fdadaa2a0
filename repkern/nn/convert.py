"""replace_convs: plain convolutions of any model -> re-parameterizable blocks."""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from repkern.nn import fold
from repkern.nn._follow import Followers, norms_after
from repkern.nn._lookalikes import lookalikes, weight_readers
from repkern.nn._surgery import replace_modules
from repkern.nn.block import RepBlock
from repkern.nn.orepa import OREPAConv2d

__all__ = ["ReplaceReport", "replace_convs"]

_logger = logging.getLogger("repkern")


@dataclass
class ReplaceReport:
    """What `replace_convs` did, by module name: `replaced`, `skipped` (name -> reason), `folded` (conv -> its norm).

    For information: `lookalikes`, convolutions of other classes than nn.Conv2d (name -> class), which it never takes;
    `weight_readers`, convolutions whose weight the code of a parent reads (name -> who), as far as its source tells.
    """

    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    lookalikes: dict[str, str] = field(default_factory=dict)
    weight_readers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} convolutions, left {len(self.skipped)}"]
        lines += [f"  left {name or '(root)'}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  {name}: took over norm {norm}" for name, norm in self.folded.items()]
        lines += [f"  not taken {name or '(root)'}: {what}" for name, what in self.lookalikes.items()]
        lines += [f"  look at {name}: {who}" for name, who in self.weight_readers.items()]
        return "\n".join(lines)


def replace_convs(
    model: nn.Module,
    block: Callable[..., nn.Module] = OREPAConv2d,
    *,
    where: Callable[[str, nn.Conv2d], bool] | None = None,
    preserve: bool = False,
    fold_norm: bool = False,
    report: ReplaceReport | None = None,
) -> nn.Module:
    """Replace every eligible nn.Conv2d of `model` by a block, in place; call it before making the optimizer.

    block: a `RepBlock` class, a functools.partial of one, or a callable with nn.Conv2d's arguments (TypeError without).
    where(name, conv): False leaves a convolution alone. Eligible: odd square kernels, floating dtype, nn.Conv2d itself
    or a subclass that computes the same way, with no parametrization and no weight shared with another module. Existing
    blocks are not walked into.
    preserve: the new block starts as exactly the old function (in eval mode, within rounding): its origin kernel takes
    what the other branches do not give. Without it the block has fresh initial values.
    fold_norm: for blocks that end in a norm of their own; the BatchNorm that follows a replaced convolution becomes
    part of the block and an nn.Identity takes its place, instead of normalizing twice. Found by tracing the model in
    train and in eval mode. Where such a norm may not be the only reader of the convolution (a hook on it, another use
    of its output, code that cannot be traced) or has no running statistics, both are left, with the reason in
    `report.skipped`. ValueError for a block without a norm.
    report: filled with what was replaced and what was left, and why; it is logged as well.

    Hooks, training flag, device, dtype, requires_grad and sharing of modules are kept. Returns the model; when the
    model itself is a convolution, its replacement. UserWarning when there is nothing to replace.
    """
    report = ReplaceReport() if report is None else report
    kind, _ = _block_class(block)
    if kind is None:
        _check_callable(block)
    if fold_norm and not (kind is not None and kind.has_norm):
        name = str(block) if kind is None else kind.__name__
        raise ValueError(
            f"fold_norm=True needs a block with a norm of its own; {name} has none, and without the norm that follows "
            "it, training diverges (paper, Table 3): leave fold_norm=False, or use OREPABlock"
        )
    norms, doubtful = norms_after(model) if fold_norm else Followers({}, {})
    report.lookalikes.update(lookalikes(model))
    report.weight_readers.update(weight_readers(model))
    new_of: dict[int, nn.Module] = {}
    for name, conv in _convolutions(model):
        norm_name, norm = norms.get(id(conv), ("", None))
        reason = _why_not(conv, model)
        if reason is None and where is not None and not where(name, conv):
            reason = "not picked by `where`"
        if reason is None:
            reason = doubtful.get(id(conv))
        if reason is None:
            reason = _try_to_make(block, conv, norm, preserve, new_of)
        if reason is not None:
            report.skipped[name] = reason
            continue
        report.replaced.append(name)
        if norm is not None:
            new_of[id(norm)] = nn.Identity()
            report.folded[name] = norm_name
    root = replace_modules(model, lambda name, module: new_of.get(id(module)), is_leaf=_is_block)
    _logger.info("replace_convs: %s", report)
    if not report.replaced:
        left = "; ".join(f"{name or '(root)'}: {reason}" for name, reason in report.skipped.items())
        found = f"the convolutions it has were left ({left})" if left else "it has no nn.Conv2d"
        warnings.warn(
            f"replace_convs: nothing to replace in {type(model).__name__}: {found}", UserWarning, stacklevel=2
        )
    return root


def _owners(model: nn.Module, parameter: nn.Parameter) -> int:
    return sum(parameter is own for module in model.modules() for own in module.parameters(recurse=False))


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, RepBlock)


def _convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Every convolution once, by its first name; those inside blocks belong to the blocks."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if _is_block(module):
            inside |= {id(child) for child in module.modules()}
        elif isinstance(module, nn.Conv2d) and id(module) not in inside:
            yield name, module


def _why_not(conv: nn.Conv2d, model: nn.Module) -> str | None:
    """None when any block may replace `conv`, else the reason in words."""
    kind = type(conv)
    if kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
        return f"{kind.__name__} computes its own forward"
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in conv.parameters()):
        return "its weight is not initialized yet (lazy module)"
    if (
        set(conv._parameters) != {"weight", "bias"}
        or conv._parameters["weight"] is None
        or conv._buffers
        or conv._modules
    ):
        return "it has parameters, buffers or children of its own (a parametrization, weight norm, ...)"
    height, width = conv.kernel_size
    if height != width:
        return f"kernel {height}x{width} is not square"
    if height % 2 == 0:
        return f"kernel {height}x{width} is even"
    if conv.weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"its dtype is {conv.weight.dtype}"
    if any(_owners(model, p) > 1 for p in conv.parameters()):
        return "its weight or bias is shared with another module"
    return None


def _try_to_make(
    block: Callable[..., nn.Module],
    conv: nn.Conv2d,
    norm: nn.Module | None,
    preserve: bool,
    new_of: dict[int, nn.Module],
) -> str | None:
    """Enter the block that replaces `conv` (and its norm) into `new_of`, or say why this block class cannot."""
    try:
        kind, options = _block_class(block)
        new = _construct(block, conv) if kind is None else kind.from_conv(conv, **options)
    except ValueError as problem:
        return str(problem)
    if (preserve or norm is not None) and not isinstance(new, RepBlock):
        raise TypeError(f"preserve and fold_norm need a repkern block, got {type(new).__name__}")
    if isinstance(new, RepBlock):
        _start(new, conv, norm, preserve)
    _copy_flags(conv, new, norm)
    new_of[id(conv)] = new
    return None


@torch.no_grad()
def _start(new: RepBlock, conv: nn.Conv2d, norm: nn.Module | None, preserve: bool) -> None:
    """Hand over the norm, and with `preserve` the function."""
    adopted = norm is not None and new.adopt_norm(norm)
    if not preserve:
        return
    if adopted:
        new.set_kernel_before_norm(conv.weight, conv.bias)
    elif norm is not None:
        new.set_equivalent_kernel_bias(*fold.fuse_bn(conv.weight, conv.bias, norm))
    else:
        new.set_equivalent_kernel_bias(conv.weight, conv.bias)


def _copy_flags(conv: nn.Conv2d, new: nn.Module, norm: nn.Module | None) -> None:
    of_norm = set() if norm is None else {id(p) for p in norm.parameters()}
    for name, parameter in new.named_parameters():
        if id(parameter) not in of_norm:
            like = conv.bias if name == "bias" and conv.bias is not None else conv.weight
            if not like.requires_grad:  # what the block itself keeps constant stays so
                parameter.requires_grad_(False)
    new.training = conv.training
    for child in new.modules():
        if child is not norm:
            child.training = conv.training


def _block_class(block: Callable[..., nn.Module]) -> tuple[type[RepBlock] | None, dict[str, Any]]:
    """The block class, and the keyword arguments a functools.partial of it adds; None for any other callable."""
    kind, options = block, {}
    if isinstance(block, functools.partial) and not block.args:
        kind, options = block.func, block.keywords
    return (kind, options) if isinstance(kind, type) and issubclass(kind, RepBlock) else (None, {})


def _check_callable(block: Callable[..., nn.Module]) -> None:
    """TypeError for what cannot be called as nn.Conv2d is."""
    try:
        inspect.signature(block).bind(1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1, True, "zeros", device=None, dtype=None)
    except ValueError:  # a callable that has no signature to read
        return
    except TypeError as problem:
        name = getattr(block, "__name__", repr(block))
        raise TypeError(
            f"replace_convs: block must be a class derived from RepBlock, a functools.partial of one with keywords "
            f"only, or take nn.Conv2d's arguments; {name} does not ({problem})"
        ) from problem


def _construct(block: Callable[..., nn.Module], conv: nn.Conv2d) -> nn.Module:
    factory: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    return block(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        **factory,
    )
