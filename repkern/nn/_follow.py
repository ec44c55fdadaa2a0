"""Which BatchNorm follows which convolution, and where that cannot be shown."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repkern.nn._called_whole import children_called_whole
from repkern.nn._norm_state import SyncBatchNorm, untouched
from repkern.nn._surgery import names_of_modules
from repkern.nn._tracing import restored
from repkern.nn.block import RepBlock

__all__ = ["Followers", "norms_after"]

_logger = logging.getLogger("repkern")
_Pair = tuple[nn.Module, nn.Module]


class Followers(NamedTuple):
    """By id of a convolution. sure: (name, BatchNorm) that alone reads its output and reads nothing else.

    doubtful: why the BatchNorm that seems to follow may not be the only reader, in words.
    """

    sure: dict[int, tuple[str, nn.Module]]
    doubtful: dict[int, str]


def norms_after(model: nn.Module) -> Followers:
    """By tracing the model, in train and in eval mode; parts that cannot be traced are not looked into.

    Inside such a part only those children are traced of which its source shows that it calls nothing but the whole.
    Forward and backward hooks count as readers.
    """
    names = names_of_modules(model)
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values() if child is not None)
    seen = _Seen(set(), set(), set(), set(), places)
    _look_into(model, seen)
    followers = Followers({}, {})
    for conv, norm in [*seen.pairs, *(_neighbours(model) - seen.pairs - seen.repeated)]:
        if not _fit(conv, norm) or id(conv) in followers.sure:
            continue
        reason = _doubt(conv, norm, names[id(norm)], (conv, norm) in seen.pairs, conv in seen.opaque)
        if reason is None:
            followers.sure[id(conv)] = names[id(norm)], norm
        else:
            followers.doubtful[id(conv)] = reason
    for conv, norm in seen.shared | seen.repeated:
        if _fit(conv, norm) and id(conv) not in followers.sure:
            followers.doubtful.setdefault(id(conv), f"norm {names[id(norm)]} follows but is not all that reads it")
    return followers


class _Seen(NamedTuple):
    """What was found. pairs: alone with each other. shared: where others read too. repeated: called several times.

    opaque: modules of parts that cannot be traced. places: id of a module -> in how many it sits.
    """

    pairs: set[_Pair]
    shared: set[_Pair]
    repeated: set[_Pair]
    opaque: set[nn.Module]
    places: Counter[int]


def _doubt(conv: nn.Module, norm: nn.Module, name: str, traced: bool, opaque: bool) -> str | None:
    if not traced:
        reason = "in a part that cannot be traced" if opaque else "and others may read it or the norm"
        return (
            f"norm {name} follows in an nn.Sequential, {reason}: that nothing else reads the convolution's output is "
            "not certain. Give replace_convs the part of the model that is called as a whole, or fold_norm=False"
        )
    for watched, what in ((conv, "the convolution"), (norm, f"its norm {name}")):
        hooked = watched._forward_hooks or watched._backward_hooks or watched._backward_pre_hooks
        if hooked or (watched is norm and not untouched(norm)):
            return f"a hook on {what} reads what is between them"
    if norm.track_running_stats is False or norm.running_mean is None:  # type: ignore[union-attr]
        return f"its norm {name} keeps no running statistics (track_running_stats=False), so it cannot be folded"
    return None


def _fit(conv: nn.Module, norm: nn.Module) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and isinstance(norm, _BatchNorm)
        and _only_normalizes(norm)
        and norm.num_features == conv.out_channels
    )


def _only_normalizes(norm: _BatchNorm) -> bool:
    """Not a subclass that computes more, as timm's norms, which run the activation too."""
    return type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)


def _look_into(root: nn.Module, seen: _Seen) -> None:
    """Add the pairs below `root`, which nobody calls but as a whole."""
    found = [_trace(root, training) for training in (True, False)]
    for pair in found[0].pairs | found[1].pairs:  # in the other mode neither is called, or they are a pair there too
        elsewhere = any(pair not in trace.pairs and trace.called & set(pair) for trace in found)
        (seen.shared if elsewhere else seen.pairs).add(pair)
    seen.shared.update(found[0].shared, found[1].shared)
    seen.repeated.update(found[0].repeated, found[1].repeated)
    failed = found[0].failed | found[1].failed
    for part in [module for module in root.modules() if module in failed]:
        if part not in seen.opaque:
            seen.opaque.update(part.modules())
            for child in children_called_whole(part):
                if all(seen.places[id(module)] == 1 for module in child.modules()):
                    _look_into(child, seen)


class _Trace(NamedTuple):
    """called: every module that is called, and those of parts that cannot be traced, the roots of which are failed."""

    pairs: set[_Pair]
    shared: set[_Pair]
    repeated: set[_Pair]
    called: set[nn.Module]
    failed: set[nn.Module]


class _Tracer(fx.Tracer):
    """Keeps modules that cannot run on proxies as single calls, and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: set[nn.Module] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, RepBlock | nn.Conv2d | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        def careful(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except Exception as problem:  # user code runs on proxies and may raise anything
                _logger.info("replace_convs: tracing failed in %s (%s)", type(m).__name__, problem)
                self.failed.add(m)
                return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

        return super().call_module(m, careful, args, kwargs)


def _trace(root: nn.Module, training: bool) -> _Trace:
    tracer = _Tracer()
    with restored(root) as kept:
        for module in root.modules():
            vars(module)["training"] = training
        try:
            graph = tracer.trace(root)
        except Exception as problem:  # as in the tracer
            _logger.info("replace_convs: tracing failed (%s)", problem)
            return _Trace(set(), set(), set(), set(root.modules()), {root})
    modules = dict(root.named_modules())
    inside = {module for part in tracer.failed for module in part.modules()}
    calls: list[tuple[fx.Node, nn.Module]] = [
        (node, modules[str(node.target)]) for node in graph.nodes if node.op == "call_module"
    ]
    times = Counter(id(module) for _, module in calls)
    module_of = dict(calls)
    trace = _Trace(set(), set(), set(), inside.union(module_of.values()), tracer.failed)
    for node, module in calls:
        for norm in (module_of[user] for user in node.users if user in module_of):
            if {module, norm} & inside:
                continue
            alone = len(node.users) == 1 and node not in kept.nodes
            once = times[id(module)] == times[id(norm)] == 1
            kind = trace.shared if not alone else trace.pairs if once else trace.repeated
            kind.add((module, norm))
    return trace


def _neighbours(model: nn.Module) -> set[_Pair]:
    """What follows what in nn.Sequential, if that is called as a whole."""
    return {
        (first, second)
        for parent in model.modules()
        if type(parent).forward is nn.Sequential.forward
        for first, second in itertools.pairwise(parent._modules.values())
        if first is not None and second is not None
    }
