"""Which BatchNorm follows which convolution."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repkern.nn._surgery import names_of_modules
from repkern.nn.block import RepBlock

__all__ = ["norms_after"]

_logger = logging.getLogger("repkern")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, RepBlock | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _only_normalizes(module: nn.Module) -> bool:
    """Not a subclass that computes more, as timm's norms, which run the activation too."""
    return isinstance(module, _BatchNorm) and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def norms_after(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """id of a convolution -> (name, BatchNorm) that alone reads its output and reads nothing else.

    By tracing the model; where it cannot be traced, from neighbours in nn.Sequential, whose order is certain.
    """
    try:
        pairs = _traced_pairs(model)
    except Exception as problem:  # user code runs on proxies and may raise anything
        _logger.info("replace_convs: tracing failed (%s); norms are looked for in nn.Sequential only", problem)
        pairs = _sequential_pairs(model)
    names = names_of_modules(model)
    return {
        id(conv): (names[id(norm)], norm)
        for conv, norm in pairs
        if isinstance(conv, nn.Conv2d) and _only_normalizes(norm) and norm.num_features == conv.out_channels
    }


def _traced_pairs(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    graph = _Tracer().trace(model)
    calls: list[tuple[Any, nn.Module]] = [
        (node, model.get_submodule(str(node.target))) for node in graph.nodes if node.op == "call_module"
    ]
    times = Counter(id(module) for _, module in calls)
    module_of = dict(calls)
    pairs = []
    for node, module in calls:
        users = list(node.users)
        if len(users) == 1 and users[0] in module_of:
            norm = module_of[users[0]]
            if times[id(module)] == times[id(norm)] == 1:
                pairs.append((module, norm))
    return pairs


def _sequential_pairs(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values() if child is not None)
    pairs = []
    for parent in model.modules():
        if type(parent).forward is nn.Sequential.forward:
            children = list(parent._modules.values())
            for first, second in itertools.pairwise(children):
                if first is not None and second is not None and places[id(first)] == places[id(second)] == 1:
                    pairs.append((first, second))
    return pairs
