"""Which modules and functions optimize_for_inference understands."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from repkern.deploy._methods import ConvSpec
from repkern.nn import SyncBatchNorm

__all__ = [
    "activation_of",
    "adds",
    "changes_in_place",
    "does_nothing",
    "foldable_norm",
    "has_hooks",
    "module_activation",
    "spec_of",
    "why_not_conv",
    "why_not_linear",
]

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_FUNCTIONS: dict[Any, str] = {
    functional.relu: "relu",
    functional.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    functional.relu6: "relu6",
    functional.silu: "silu",
    functional.hardswish: "hardswish",
}
_METHODS = {"relu": "relu", "relu_": "relu"}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches the calls of this very module."""
    return any(getattr(module, name) for name in _HOOKS)


def why_not_conv(conv: nn.Conv2d) -> str | None:
    """None where this convolution can be an InferenceConv2d, else why it stays."""
    if type(conv) is not nn.Conv2d:
        return f"a subclass of Conv2d ({type(conv).__name__}) may compute something else"
    if has_hooks(conv):
        return "it has hooks"
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode!r}"
    if not (conv.weight.is_floating_point() and type(conv.weight) is nn.Parameter):
        return f"its weight is {type(conv.weight).__name__} of {conv.weight.dtype}"
    if conv.padding == "same" and any(
        dilation * (k - 1) % 2 for dilation, k in zip(conv.dilation, conv.kernel_size, strict=True)
    ):
        return "its padding is not the same on both sides"
    return None


def why_not_linear(linear: nn.Linear) -> str | None:
    """None where this layer can be an InferenceLinear, else why it stays."""
    if type(linear) is not nn.Linear:
        return f"a subclass of Linear ({type(linear).__name__}) may compute something else"
    if has_hooks(linear):
        return "it has hooks"
    if not (linear.weight.is_floating_point() and type(linear.weight) is nn.Parameter):
        return f"its weight is {type(linear.weight).__name__} of {linear.weight.dtype}"
    return None


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def spec_of(conv: nn.Conv2d, activation: str, precision: str) -> ConvSpec:
    """The layer that this convolution becomes; `why_not_conv` must be None."""
    kernel, dilation = _pair(conv.kernel_size), _pair(conv.dilation)
    if isinstance(conv.padding, str):
        same = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
        padding = same if conv.padding == "same" else (0, 0)
    else:
        padding = _pair(conv.padding)
    return ConvSpec(
        conv.in_channels,
        conv.out_channels,
        kernel,
        _pair(conv.stride),
        padding,
        dilation,
        conv.groups,
        activation,
        precision,
    )


def foldable_norm(module: nn.Module | None, conv: nn.Conv2d) -> bool:
    """Whether this is a BatchNorm whose running statistics can go into the convolution's weights."""
    return (
        isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm | SyncBatchNorm)
        and type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)
        and not has_hooks(module)
        and not module.training
        and module.running_mean is not None
        and module.running_var is not None
        and module.num_features == conv.out_channels
    )


def activation_of(node: fx.Node, module: nn.Module | None) -> str | None:
    """The name of the activation that a node is, None for another node."""
    if node.op == "call_module" and module is not None:
        return None if has_hooks(module) else _MODULES.get(type(module))
    if node.op == "call_function" and len(node.args) == 1 and set(node.kwargs) <= {"inplace"}:
        return _FUNCTIONS.get(node.target)
    if node.op == "call_method" and len(node.args) == 1 and not node.kwargs:
        return _METHODS.get(str(node.target))
    return None


def module_activation(module: nn.Module | None) -> str | None:
    """The name of the activation that a module is, None for another module."""
    return None if module is None or has_hooks(module) else _MODULES.get(type(module))


def adds(node: fx.Node) -> bool:
    """Whether a node is the plain sum of two values of the graph."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return False
    if node.op == "call_function":
        return node.target in _ADDITIONS
    return node.op == "call_method" and node.target in ("add", "add_")


def changes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node may write to one of its inputs."""
    if node.op == "call_module":
        return module is None or bool(getattr(module, "inplace", False)) or not _from_torch(module)
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and (name.endswith("_") or name in _INPLACE_OPERATORS)


_INPLACE_OPERATORS = {
    "setitem",
    *(name for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator)),
}


def _from_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn", "repkern."))


def does_nothing(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node returns its input in eval mode."""
    if node.op == "call_module" and module is not None and not has_hooks(module):
        return type(module) in (nn.Identity, nn.Dropout, nn.Dropout2d) and not module.training and len(node.args) == 1
    dropouts: tuple[Callable[..., Any], ...] = (functional.dropout, functional.dropout2d)
    return node.op == "call_function" and node.target in dropouts and node.kwargs.get("training") is False
