"""Convolutions exchanged inside a model whose forward is no graph: only modules are touched."""

from __future__ import annotations

from collections import Counter

from torch import nn

from repkern.deploy._convertible import foldable_norm, has_hooks, module_activation, spec_of, why_not_conv
from repkern.deploy.inference_conv import InferenceConv2d
from repkern.nn._surgery import replace_modules
from repkern.nn.fold import fuse_bn

__all__ = ["convert_modules"]


def convert_modules(
    model: nn.Module, precision: str, *, neighbours: bool
) -> tuple[nn.Module, dict[InferenceConv2d, list[str]]]:
    """The model with its convolutions exchanged, in place, and each of the new layers with what was fused into it.

    neighbours: BatchNorm and activation that follow in an nn.Sequential go inside, and become nn.Identity there. The
    order of calls is certain in a Sequential, though not that nobody else reads what is between.
    """
    fused: dict[InferenceConv2d, list[str]] = {}
    if neighbours:
        places = Counter(id(child) for parent in model.modules() for child in parent._modules.values() if child)
        for parent in list(model.modules()):
            if type(parent).forward is nn.Sequential.forward:
                _fuse_neighbours(parent, places, precision, fused)

    def exchange(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Conv2d) or why_not_conv(module) is not None:
            return None
        layer = InferenceConv2d(spec_of(module, "none", precision), module.weight, module.bias)
        layer.train(module.training)
        fused[layer] = []
        return layer

    return replace_modules(model, exchange), fused


def _fuse_neighbours(
    parent: nn.Module, places: Counter[int], precision: str, fused: dict[InferenceConv2d, list[str]]
) -> None:
    children = list(parent._modules.items())
    for at, (name, conv) in enumerate(children):
        if not isinstance(conv, nn.Conv2d) or why_not_conv(conv) is not None or places[id(conv)] != 1:
            continue
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        parts: list[str] = []
        rest = children[at + 1 :]
        if rest and rest[0][1] is not None and foldable_norm(rest[0][1], conv):
            weight, bias = fuse_bn(weight, bias, rest[0][1])
            parts.append("BatchNorm")
        after = rest[len(parts)] if len(rest) > len(parts) else None
        activation = None if after is None else module_activation(after[1])
        if activation is not None:
            parts.append(activation)
        if not parts:
            continue
        layer = InferenceConv2d(spec_of(conv, activation or "none", precision), weight, bias)
        layer.train(conv.training)
        fused[layer] = parts
        parent._modules[name] = layer
        for other, module in rest[: len(parts)]:
            assert module is not None
            assert not has_hooks(module)
            parent._modules[other] = nn.Identity().train(module.training)
