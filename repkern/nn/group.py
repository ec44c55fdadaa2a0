"""group_squeeze: the kernels of all OREPA convolutions of a model from one launch."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from repkern.nn.orepa import GroupedKernel, OREPAConv2d
from repkern.ops import orepa_squeeze_many

__all__ = ["group_squeeze", "ungroup_squeeze"]


def group_squeeze(model: nn.Module) -> nn.Module:
    """Squeeze all OREPAConv2d inside `model` by one `orepa_squeeze_many` at the start of each of its forwards.

    Worth it on a GPU, where one launch per convolution costs more than its work. The result and the gradients are
    those of the ungrouped model, also with several forwards per backward, gradient accumulation, checkpointing (both
    kinds), autocast, deepcopy and pickle. A convolution called outside a forward of `model`, or under another autocast
    or gradient mode than `model` was, squeezes itself. All kernels live for the whole forward, and gradients of the
    branches arrive together at the end of the backward (so DistributedDataParallel overlaps less).

    Returns `model`. UserWarning when it has no OREPAConv2d. `repkern.reparameterize` undoes the grouping;
    `ungroup_squeeze` does so alone.
    """
    if not any(isinstance(module, OREPAConv2d) for module in model.modules()):
        warnings.warn(f"group_squeeze: {type(model).__name__} has no OREPAConv2d", UserWarning, stacklevel=2)
        return model
    ungroup_squeeze(model)
    hook = _GroupSqueeze()
    model.register_forward_pre_hook(hook.before)
    model.register_forward_hook(hook.after, always_call=True)
    return model


def ungroup_squeeze(model: nn.Module) -> nn.Module:
    """Undo `group_squeeze` on `model` and whatever is inside it. Returns `model`."""
    for module in model.modules():
        keys = [key for key, hook in _hooks(module) if isinstance(getattr(hook, "__self__", None), _GroupSqueeze)]
        for key in keys:
            module._forward_pre_hooks.pop(key, None)
            module._forward_hooks.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
    return model


def _hooks(module: nn.Module) -> list[tuple[int, Any]]:
    return [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]


class _GroupSqueeze:
    """The two hooks of one grouped model. Nothing but time depends on the list of convolutions being current."""

    def __init__(self) -> None:
        self._convs: list[OREPAConv2d] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_convs": None}

    def before(self, model: nn.Module, args: Any) -> None:
        """Fill every convolution's kernel for this forward."""
        if getattr(model, "_is_replica", False):
            return  # nn.DataParallel's threads share this object, but not the convolutions
        if self._convs is None:
            self._convs = [module for module in model.modules() if isinstance(module, OREPAConv2d)]
        batches: dict[tuple[Hashable, ...], list[OREPAConv2d]] = defaultdict(list)
        for conv in self._convs:
            parameter = conv.origin.weight
            written = (conv.kernel_dtype(parameter.device.type), conv.last_format)
            # Frozen ones apart: in a batch with trainable ones their kernels would get gradients too.
            key = (*written, parameter.device, parameter.dtype, conv.trains_kernel)
            batches[key].append(conv)
        for convs in batches.values():
            dtype, memory_format = convs[0].kernel_dtype(convs[0].origin.weight.device.type), convs[0].last_format
            layers = [conv.squeeze_branches() for conv in convs]
            kernels = orepa_squeeze_many(layers, out_dtype=dtype, memory_format=memory_format)
            for conv, kernel in zip(convs, kernels, strict=True):
                conv.grouped = GroupedKernel(kernel, torch.is_grad_enabled())

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Drop the kernels; also when the forward raised."""
        for conv in self._convs or ():
            conv.grouped = None
