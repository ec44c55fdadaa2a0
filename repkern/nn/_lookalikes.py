"""What `replace_convs` does not take but its user may have expected it to: for its report, as information."""

from __future__ import annotations

import ast

from torch import nn
from torch.nn.modules.conv import _ConvNd

from repkern.nn._called_whole import class_tree
from repkern.nn.block import RepBlock

__all__ = ["lookalikes", "weight_readers"]


def lookalikes(model: nn.Module) -> dict[str, str]:
    """Name -> class of convolutions that are not nn.Conv2d: transposed, 1-d and 3-d ones, and modules that call so.

    The latter: modules of other classes with a kernel_size and a weight of at least three dimensions.
    """
    inside = _inside_blocks(model)
    found = {}
    for name, module in model.named_modules():
        if id(module) in inside or isinstance(module, nn.Conv2d):
            continue
        weight = getattr(module, "weight", None) if hasattr(module, "kernel_size") else None
        if isinstance(module, _ConvNd) or getattr(weight, "ndim", 0) >= 3:
            found[name] = f"{type(module).__name__} is not an nn.Conv2d"
    return found


def weight_readers(model: nn.Module) -> dict[str, str]:
    """Name of a convolution -> which class reads its weight or bias as an attribute, instead of calling it.

    By the sources of the modules' classes, where there are any: self.conv.weight and self.conv.bias in their methods.
    """
    inside = _inside_blocks(model)
    attributes: dict[type[nn.Module], dict[str, str]] = {}
    found = {}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        reads = attributes.setdefault(type(module), _read_weights(type(module)))
        for path, what in reads.items():
            try:
                conv = module.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(conv, nn.Conv2d) and id(conv) not in inside:
                found[f"{name}.{path}" if name else path] = f"{type(module).__name__} reads its {what}"
    return found


def _inside_blocks(model: nn.Module) -> set[int]:
    return {id(part) for block in model.modules() if isinstance(block, RepBlock) for part in block.modules()}


def _read_weights(kind: type[nn.Module]) -> dict[str, str]:
    """Path below self -> "weight" or "bias", as in the methods other than __init__."""
    if kind.__module__.partition(".")[0] == "torch":
        return {}
    found: dict[str, str] = {}
    for tree in class_tree(kind) or []:
        for method in tree.body:
            if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                for node in ast.walk(method):
                    if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias"):
                        path = _path(node.value)
                        if path:
                            found.setdefault(path, node.attr)
    return found


def _path(node: ast.expr) -> str:
    """self.a.b -> "a.b" and self.a[0] -> "a.0"; "" for anything else, and for self."""
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return node.attr
        above = _path(node.value)
        return f"{above}.{node.attr}" if above else ""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
        above = _path(node.value)
        return f"{above}.{node.slice.value}" if above else ""
    return ""
