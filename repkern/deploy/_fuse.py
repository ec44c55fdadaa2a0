"""A model as one graph, and its convolutions with what follows them as one call each."""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from repkern.deploy._convertible import (
    activation_of,
    adds,
    changes_in_place,
    does_nothing,
    foldable_norm,
    has_hooks,
    spec_of,
    why_not_conv,
    why_not_linear,
)
from repkern.deploy.inference_conv import InferenceConv2d
from repkern.deploy.inference_linear import InferenceLinear
from repkern.nn._tracing import restored
from repkern.nn.fold import fuse_bn
from repkern.nn.verify import Call

__all__ = ["Untraceable", "fuse_graph", "keeps_meaning_channels_last", "trace"]


class Untraceable(Exception):
    """The model is no graph that torch.fx can see, with the reason."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            has_hooks(m)
            or isinstance(m, nn.Conv2d | InferenceConv2d)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def create_arg(self, a: Any) -> Any:
        """A dictionary of another class stays one of that class; fx itself makes a plain dict of it."""
        if isinstance(a, dict) and type(a) is not dict and not isinstance(a, fx.immutable_collections.immutable_dict):
            items: Any = super().create_arg(dict(a))
            if dataclasses.is_dataclass(a):
                return self.create_node("call_function", type(a), (), items)
            return self.create_node("call_function", type(a), (items,), {})
        return super().create_arg(a)


def trace(model: nn.Module, call: Call) -> fx.GraphModule:
    """A call of the model as a graph; what is not a tensor among its arguments, and the defaults of others, is fixed.

    Untraceable where Python decides on values, and where calling the model leaves something behind in its modules:
    in a graph that would happen no more.
    """
    if has_hooks(model):
        raise Untraceable("the model itself has hooks")
    fixed = _fixed_arguments(model, call)
    before = {module: (dict(vars(module)), _versions(module)) for module in model.modules()}
    with restored(model) as kept:
        traced, changed = _traced(model, fixed, before)
    if changed or kept.nodes:
        raise Untraceable(f"calling it changes {', '.join(dict.fromkeys(changed or ['lists that its modules hold']))}")
    return traced


def _traced(
    model: nn.Module, fixed: dict[str, Any], before: dict[nn.Module, tuple[dict[str, Any], list[int]]]
) -> tuple[fx.GraphModule, list[str]]:
    """The graph, and the classes of modules that changed meanwhile."""
    try:
        graph = _Tracer().trace(model, concrete_args=fixed or None)
        defaults = False
        for node in graph.nodes:
            node.type = None  # annotations may be strings, which torch.fx cannot write into the code that it pickles
            if node.op == "placeholder":  # in Python's order; that all are given is seen to by the caller
                defaults = defaults or bool(node.args)
                node.args = node.args or ((None,) if defaults else ())
        traced = fx.GraphModule(model, graph, class_name=type(model).__name__)
    except Exception as problem:  # user code runs on proxies and may raise anything
        first = str(problem).strip().partition("\n")[0]
        raise Untraceable(f"{type(problem).__name__}: {first}") from None
    return traced, [type(module).__name__ for module, state in before.items() if _differs(module, *state)]


def _versions(module: nn.Module) -> list[int]:
    return [0 if buffer is None or buffer.is_inference() else buffer._version for buffer in module._buffers.values()]


def _differs(module: nn.Module, before: dict[str, Any], versions: list[int]) -> bool:
    now = {name: value for name, value in vars(module).items() if not name.startswith("_tensor_constant")}
    before = {name: value for name, value in before.items() if not name.startswith("_tensor_constant")}
    if now.keys() != before.keys() or _versions(module) != versions:
        return True
    return any(now[name] is not value for name, value in before.items())


def _fixed_arguments(model: nn.Module, call: Call) -> dict[str, Any]:
    """What is no tensor among the arguments, and the defaults of those not given, by name."""
    fixed: dict[str, Any] = {}
    for at, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable("its forward takes any number of arguments")
        given = at < len(call.args) and parameter.kind is not parameter.KEYWORD_ONLY
        value = call.args[at] if given else call.kwargs.get(parameter.name, parameter.default)
        if isinstance(value, Tensor):
            continue
        if not (value is None or isinstance(value, int | float | str)):
            raise Untraceable(f"argument {parameter.name} is a {type(value).__name__}, not a tensor")
        fixed[parameter.name] = value
    return fixed


def fuse_graph(
    model: fx.GraphModule, args: Sequence[Any], precision: str, channels_last: bool
) -> dict[InferenceConv2d, list[str]]:
    """Put an InferenceConv2d in the place of every convolution that can be one and of what can run inside its call.

    args: an example, for the shapes of what is added. Returns each layer with what was fused, in the model's order.
    """
    shapes = _ShapesOf(model)
    shapes.run(*args)
    fuser = _Fuser(model, shapes.shapes, precision, channels_last)
    fuser.run()
    if channels_last:
        _reshape_for_view(model.graph)
    model.graph.lint()
    model.delete_all_unused_submodules()
    model.recompile()
    return fuser.fused


class _ShapesOf(fx.Interpreter):
    """Runs the graph and remembers the shape of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        return result


class _Fuser:
    def __init__(
        self, model: fx.GraphModule, shapes: dict[fx.Node, torch.Size], precision: str, channels_last: bool
    ) -> None:
        self.fused: dict[InferenceConv2d, list[str]] = {}
        self._model = model
        self._shapes = shapes
        self._precision = precision
        self._channels_last = channels_last

    def run(self) -> None:
        graph = self._model.graph
        for node in list(graph.nodes):
            if does_nothing(node, self._module(node)):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        nodes = [(node, self._module(node)) for node in graph.nodes]
        calls = Counter(id(module) for _, module in nodes if module is not None)
        for node, conv in nodes:
            done = conv is not self._module(node)  # at an earlier call of the same convolution
            if done:
                continue
            if isinstance(conv, nn.Conv2d) and why_not_conv(conv) is None:
                self._convert(node, conv, alone=calls[id(conv)] == 1)
            elif isinstance(conv, nn.Linear) and why_not_linear(conv) is None and self._reads_rows(node):
                self._convert_linear(node, conv, alone=calls[id(conv)] == 1)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _convert(self, node: fx.Node, conv: nn.Conv2d, alone: bool) -> None:
        """What follows goes inside as well, unless the convolution is called at several places."""
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        chain, fused = [node], []
        activation, residual = "none", None
        follower = _only_user(node) if alone else None
        norm = None if follower is None else self._module(follower)
        if follower is not None and norm is not None and foldable_norm(norm, conv):
            weight, bias = fuse_bn(weight, bias, norm)
            fused.append("BatchNorm")
            chain.append(follower)
            follower = _only_user(follower)
        if follower is not None and adds(follower):
            residual = self._residual(chain, follower)
            if residual is not None:
                fused.append("add")
                chain.append(follower)
                follower = _only_user(follower)
        name = None if follower is None else activation_of(follower, self._module(follower))
        if follower is not None and name is not None:
            activation = name
            fused.append(name)
            chain.append(follower)
        layer = InferenceConv2d(
            spec_of(conv, activation, self._precision), weight, bias, channels_last=self._channels_last
        )
        layer.train(conv.training)
        self._put(str(node.target), conv, layer)
        self._replace(chain, residual)
        self.fused[layer] = fused

    def _reads_rows(self, node: fx.Node) -> bool:
        """Whether a linear layer reads [N, C] here."""
        return bool(node.args) and len(self._shapes.get(node.args[0], ())) == 2  # type: ignore[arg-type,call-overload]

    def _convert_linear(self, node: fx.Node, linear: nn.Linear, alone: bool) -> None:
        """An activation that follows goes inside as well, unless the layer is called at several places."""
        follower = _only_user(node) if alone else None
        activation = None if follower is None else activation_of(follower, self._module(follower))
        layer = InferenceLinear(linear, activation or "none", self._precision)
        layer.train(linear.training)
        self._put(str(node.target), linear, layer)
        self._replace([node] if follower is None or activation is None else [node, follower], None)
        self.fused[layer] = [] if activation is None else [activation]

    def _put(self, target: str, conv: nn.Module, layer: InferenceConv2d) -> None:
        """In every place that the layer has."""
        for parent in list(self._model.modules()):
            for name, child in list(parent._modules.items()):
                if child is conv:
                    parent._modules[name] = layer

    def _residual(self, chain: list[fx.Node], add: fx.Node) -> fx.Node | None:
        """What is added to the end of the chain, where adding it inside the convolution's call means the same.

        The call then moves to the place of the sum, so nothing between may write to what the convolution reads.
        """
        end = chain[-1]
        first, second = add.args
        other = second if first is end else first
        if first is second or not isinstance(other, fx.Node):
            return None
        if changes_in_place(add, None) and first is not end:
            return None
        if self._shapes.get(other) is None or self._shapes.get(other) != self._shapes.get(end):
            return None
        between, at = [], chain[0].next
        while at is not add:
            between.append(at)
            at = at.next
        if any(changes_in_place(node, self._module(node)) for node in between if node not in chain):
            return None
        return other

    def _replace(self, chain: list[fx.Node], residual: fx.Node | None) -> None:
        node, end = chain[0], chain[-1]
        if end is node:
            return
        place = node if residual is None else next(link for link in chain if residual in link.args)
        with self._model.graph.inserting_before(place):
            x = node.args[0] if node.args else node.kwargs["input"]
            call = self._model.graph.call_module(str(node.target), (x,) if residual is None else (x, residual))
        if end in self._shapes:
            self._shapes[call] = self._shapes[end]
        end.replace_all_uses_with(call)
        for link in reversed(chain):
            self._model.graph.erase_node(link)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


_COPIES = ("view", "view_as", "reshape", "reshape_as", "flatten", "contiguous")
_SEES_STRIDES = (
    "as_strided",
    "as_strided_",
    "stride",
    "is_contiguous",
    "storage_offset",
    "data_ptr",
    "untyped_storage",
)


def keeps_meaning_channels_last(model: fx.GraphModule) -> bool:
    """Whether the graph asks for no strides, and writes to nothing that would be a copy in another memory order."""
    for node in model.graph.nodes:
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op != "call_module" and name in _SEES_STRIDES:
            return False
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if changes_in_place(node, module) and node.args and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            if source.op != "call_module" and (
                str(source.target) in _COPIES or getattr(source.target, "__name__", "") in _COPIES
            ):
                return False
    return True


def _reshape_for_view(graph: fx.Graph) -> None:
    """Maps in channels_last cannot be viewed as rows; reshape is view where it can be, and a copy elsewhere."""
    for node in graph.nodes:
        of_bits = any(isinstance(arg, torch.dtype) for arg in node.args)
        if node.op == "call_method" and node.target in ("view", "view_as") and not of_bits:
            node.target = "reshape" if node.target == "view" else "reshape_as"
