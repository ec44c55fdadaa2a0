"""Which children a module uses by calling them only, judged by its class's source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter

from torch import nn

__all__ = ["children_called_whole", "class_tree"]

# Methods through which children are reached without their names.
_BY_ITERATION = frozenset(
    ("children", "named_children", "modules", "named_modules", "get_submodule", "__dict__", "_modules", "__getattr__")
)


def class_tree(kind: type[nn.Module]) -> list[ast.ClassDef] | None:
    """The sources of a class and of those it inherits from below nn.Module; None where one is not to be had."""
    trees = []
    for own in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(own))).body
        except (OSError, TypeError, ValueError, SyntaxError):
            return None
        if not isinstance(tree, ast.ClassDef):
            return None
        trees.append(tree)
    return trees


def children_called_whole(module: nn.Module) -> list[nn.Module]:
    """The children that sit in one place and that the module's methods do nothing with but call."""
    trees = class_tree(type(module))
    if trees is None or "forward" in vars(module):
        return []
    other: set[str] = set()
    for tree in trees:
        for method in tree.body:
            names = _used_otherwise(method)
            if names is None:
                return []
            other |= names
    times = Counter(id(child) for parent in module.modules() for child in parent._modules.values())
    return [
        child
        for name, child in module.named_children()
        if name.isidentifier() and name not in other and times[id(child)] == 1
    ]


def _used_otherwise(method: ast.stmt) -> set[str] | None:
    """Names of attributes of self that a method does more with than call; None where that is not to be seen."""
    if not isinstance(method, ast.FunctionDef):
        plain = isinstance(method, ast.Expr | ast.AnnAssign | ast.Assign | ast.Pass)
        computes = any(isinstance(node, ast.Lambda | ast.Call) for node in ast.walk(method))
        return set() if plain and not computes else None
    parents = {below: node for node in ast.walk(method) for below in ast.iter_child_nodes(node)}
    found: set[str] = set()
    for node in ast.walk(method):
        if not (isinstance(node, ast.Name) and node.id == "self"):
            continue
        use = parents[node]
        if not isinstance(use, ast.Attribute):
            return None  # handed to someone, iterated or indexed
        if use.attr in _BY_ITERATION and method.name != "__init__":
            return None
        around = parents.get(use)
        called = isinstance(around, ast.Call) and around.func is use
        if not called and not isinstance(use.ctx, ast.Store):
            found.add(use.attr)
    own = method.args.posonlyargs + method.args.args
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in method.decorator_list)
    return found if static or (own and own[0].arg == "self") else None
