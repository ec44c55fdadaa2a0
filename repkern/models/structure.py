"""The modules of a model as JSON: in what it differs from a freshly made one, so that a file can hold a changed model.

Needed for networks whose blocks were swapped, grown or cut after `create_model` (replace_convs, DyRep, a partial
reparameterization). Only classes of torch.nn and repkern.nn are written and made; a file cannot name anything else.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from repkern.nn._norm_state import SYNCHRONIZED
from repkern.nn.block import RepBlock
from repkern.nn.branch_weight import BranchWeight

__all__ = ["apply_changes", "changes_between"]

_Spec = dict[str, Any]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NOT_STRUCTURE = ("self", "device", "dtype")


def changes_between(model: nn.Module, fresh: nn.Module) -> dict[str, _Spec]:
    """Dotted name -> description of the module there, for every module of `model` that `fresh` does not have.

    ValueError, naming the module, for one that cannot be described.
    """
    changes: dict[str, _Spec] = {}
    _compare("", model, fresh, changes)
    return changes


def apply_changes(model: nn.Module, changes: dict[str, _Spec]) -> None:
    """Put the described modules into `model`. ValueError for a description that is not one of ours."""
    if not isinstance(changes, dict):
        raise ValueError(f"changes must be a dictionary, got {type(changes).__name__}")
    for name, spec in changes.items():
        parent_name, _, last = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
        except AttributeError:
            raise ValueError(f"the file describes {name}, but {type(model).__name__} has no {parent_name}") from None
        if last not in parent._modules:  # anything else of a module is not for a file to replace
            raise ValueError(f"the file describes {name}, but {type(parent).__name__} has no such module")
        setattr(parent, last, _build(name, spec))


def _compare(name: str, module: nn.Module | None, fresh: nn.Module | None, changes: dict[str, _Spec]) -> None:
    if module is None and fresh is None:
        return
    if module is None or fresh is None or not _alike(module, fresh):
        if not name:
            assert module is not None
            raise ValueError(
                f"{type(module).__name__} itself was replaced or has other children than create_model makes"
            )
        changes[name] = _describe(name, module)
        return
    if isinstance(module, RepBlock) and any(
        fresh._modules[child] is None and part is not None for child, part in module._modules.items()
    ):
        changes[name] = _describe(name, module)  # it has grown a branch, which its arguments tell better than its parts
        return
    for child in module._modules:
        _compare(f"{name}.{child}" if name else child, module._modules[child], fresh._modules[child], changes)


def _kind(module: nn.Module) -> type[nn.Module]:
    # A file should not need a process group to be read: a synchronized norm is a norm.
    return nn.BatchNorm2d if isinstance(module, SYNCHRONIZED) else type(module)


def _alike(module: nn.Module, fresh: nn.Module) -> bool:
    """Whether the two are the same, their children aside."""
    return (
        _kind(module) is _kind(fresh)
        and list(module._modules) == list(fresh._modules)
        and (isinstance(module, SYNCHRONIZED) or module.extra_repr() == fresh.extra_repr())
        and _tensors(module) == _tensors(fresh)
    )


def _tensors(module: nn.Module) -> dict[str, tuple[int, ...]]:
    own = {**module._parameters, **module._buffers}
    return {name: tuple(t.shape) for name, t in own.items() if t is not None}


def _describe(name: str, module: nn.Module | None) -> _Spec:
    if module is None:
        return {"class": None}
    kind = _kind(module)
    if kind in _CONTAINERS:
        # A list, because order matters and a file's metadata may be sorted.
        children = [[child, _describe(f"{name}.{child}", inner)] for child, inner in module._modules.items()]
        return {"class": f"torch.nn.{kind.__name__}", "children": children}
    spec: _Spec = {"class": _class_name(name, kind), "arguments": _arguments(name, module, kind)}
    changes: dict[str, _Spec] = {}
    try:
        with torch.device("meta"):
            fresh = _build(name, spec)
    except (TypeError, NotImplementedError, RuntimeError) as problem:
        raise ValueError(f"{name} ({kind.__name__}) cannot be made from its own attributes: {problem}") from problem
    assert fresh is not None
    if not _alike(module, fresh):
        raise ValueError(f"{name} ({kind.__name__}) has another structure than its arguments {spec['arguments']} give")
    for child in module._modules:
        _compare(child, module._modules[child], fresh._modules[child], changes)
    return {**spec, "changes": changes} if changes else spec


def _class_name(name: str, kind: type[nn.Module]) -> str:
    for package in ("torch.nn", "repkern.nn"):
        text = f"{package}.{kind.__name__}"
        if _find(text) is kind:
            return text
    raise ValueError(f"{name} is a {kind.__module__}.{kind.__name__}; only classes of torch.nn and repkern.nn are kept")


def _find(text: Any) -> type[nn.Module] | None:
    import repkern.nn

    package, _, name = str(text).rpartition(".")
    home = {"torch.nn": nn, "repkern.nn": repkern.nn}.get(package)
    found = getattr(home, name, None) if home is not None and not name.startswith("_") else None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _arguments(name: str, module: nn.Module, kind: type[nn.Module]) -> _Spec:
    """The constructor's arguments, read from the attributes of the same names."""
    found: _Spec = {}
    for parameter in inspect.signature(kind.__init__).parameters.values():
        if parameter.name in _NOT_STRUCTURE or not hasattr(module, parameter.name):
            continue
        value = getattr(module, parameter.name)
        if isinstance(value, BranchWeight) or (value is None and parameter.name in module._modules):
            continue  # an initial value, which the weights of the file take the place of
        if isinstance(value, torch.Tensor) or (parameter.name == "bias" and value is None):
            value = value is not None
        if isinstance(value, nn.Module):
            value = _describe(f"{name}.{parameter.name}", value)
        found[parameter.name] = _json(f"{name}.{parameter.name}", value)
    return found


def _json(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_json(name, item) for item in value]
    if isinstance(value, dict):
        return {str(key): _json(name, item) for key, item in value.items()}
    raise ValueError(f"{name} is a {type(value).__name__}, which a file cannot describe")


def _value(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(name, item) for item in value)
    if isinstance(value, dict) and "class" in value:
        return _build(name, value)
    return value


def _build(name: str, spec: Any) -> nn.Module | None:
    if not isinstance(spec, dict) or "class" not in spec:
        raise ValueError(f"{name}: {spec!r} describes no module")
    if spec["class"] is None:
        return None
    kind = _find(spec["class"])
    if kind is None:
        raise ValueError(f"{name}: {spec['class']!r} is no module class of torch.nn or repkern.nn")
    if kind in _CONTAINERS:
        container = kind()
        for child, inner in _children(name, spec.get("children", [])):
            container.add_module(child, _build(f"{name}.{child}", inner))
        return container
    arguments = spec.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}: arguments must be a dictionary, got {type(arguments).__name__}")
    module = kind(**{key: _value(f"{name}.{key}", value) for key, value in arguments.items()})
    apply_changes(module, spec.get("changes", {}))
    return module


def _children(name: str, children: Any) -> list[tuple[str, Any]]:
    pairs: list[Any] = children if isinstance(children, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise ValueError(f"{name}: children must be a list of names and modules")
    return [(pair[0], pair[1]) for pair in pairs]
