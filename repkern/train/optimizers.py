"""Optimizers of a recipe, their state by the names of parameters, and how they follow a change of the network."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn import custom_l2_parameters
from repkern.optim import RepAdamW, RepSGD, from_scales, weight_decay_groups
from repkern.train.callbacks import StructureChanged
from repkern.train.recipe import TrainingRecipe
from repkern.train.sharded import part_like

__all__ = ["follow_structure", "load_optimizer", "make_optimizer", "optimizer_state", "parameter_groups"]

_FACTOR = "lr_factor"  # kept in each group: a new parameter joins the group with its decay and factor


def make_optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """The optimizer of `recipe`; repsgd and repadamw also give `model` its first kernels, from the file of scales."""
    wanted = recipe.optimizer
    groups = parameter_groups(model, recipe)
    common: dict[str, Any] = {"lr": wanted.lr, "weight_decay": wanted.weight_decay}
    momentum: dict[str, Any] = {"momentum": wanted.momentum, "nesterov": wanted.nesterov and wanted.momentum > 0}
    adam: dict[str, Any] = {"betas": wanted.betas, "eps": wanted.eps}
    if wanted.name in ("repsgd", "repadamw"):
        kind = wanted.name.removeprefix("rep")
        options = momentum if kind == "sgd" else adam
        rules: dict[str, Any] = {
            "initialize": wanted.initialize,
            "multiply": wanted.multiply,
            "constants": wanted.constants,
        }
        return from_scales(model, wanted.scales, optimizer=kind, params=groups, **rules, **common, **options)
    if wanted.name == "adamw":
        return torch.optim.AdamW(groups, **common, **adam)
    if wanted.name == "rmsprop":
        return torch.optim.RMSprop(groups, **common, momentum=wanted.momentum, eps=wanted.eps)
    return torch.optim.SGD(groups, **common, **momentum)


def parameter_groups(model: nn.Module, recipe: TrainingRecipe) -> list[dict[str, Any]]:
    """Groups of (name, parameter) by weight decay and by the factor on the learning rate.

    ValueError for a pattern of `layer_lr` that matches no parameter, and for a model with nothing to train.
    """
    wanted = recipe.optimizer
    groups = weight_decay_groups(model, wanted.weight_decay, decay_scales=wanted.decay_scales)
    names = [name for group in groups for name, _ in group["params"]]
    idle = [p for p in wanted.layer_lr if not any(fnmatchcase(name, p) for name in names)]
    if idle:
        raise ValueError(
            f"optimizer.layer_lr: {idle[0]!r} matches no trained parameter; there are {', '.join(names[:6])}"
        )
    spared = {id(p) for p in custom_l2_parameters(model)} if recipe.loss.custom_l2 else set()
    split: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for group in groups:
        for name, parameter in group["params"]:
            decay = wanted.weight_decay if wanted.decay_all else group["weight_decay"]
            decay = 0.0 if id(parameter) in spared else decay
            split.setdefault((decay, _factor(name, wanted.layer_lr)), []).append((name, parameter))
    return [
        {"params": params, "weight_decay": decay, "lr": wanted.lr * factor, _FACTOR: factor}
        for (decay, factor), params in split.items()
    ]


def _factor(name: str, layer_lr: Mapping[str, float]) -> float:
    return next((factor for pattern, factor in layer_lr.items() if fnmatchcase(name, pattern)), 1.0)


def optimizer_state(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state_dict, and the names of the parameters of each group.

    ValueError for a parameter that is not among `named`: it could not be found again.
    """
    names = {id(parameter): name for name, parameter in named.items()}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        unknown = sum(id(parameter) not in names for parameter in group["params"])
        if unknown:
            raise ValueError(
                f"group {index} of {type(optimizer).__name__} has {unknown} parameters that the network lacks and no "
                "callback names: after a change of the network call Trainer.structure_changed"
            )
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return {"names": groups, "state_dict": optimizer.state_dict()}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], named: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_state`, whatever parameters the groups held before. ValueError when it does not fit."""
    names, packed = state["names"], state["state_dict"]
    missing = [name for group in names for name in group if name not in named]
    if missing:
        raise ValueError(f"the optimizer trained {missing[0]} (and {len(missing) - 1} more), which the model has not")
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    groups = optimizer.param_groups
    present = {id(parameter) for group in groups for parameter in group["params"]}
    held = {name for name in trained if id(named[name]) in present}
    left = sorted(held - {name for group in names for name in group})
    if left:
        raise ValueError(f"the saved optimizer did not train {left[0]} (and {len(left) - 1} more)")
    for saved in packed["param_groups"][len(groups) :]:
        optimizer.add_param_group({**saved, "params": []})
    for group, members in zip(groups, names, strict=True):
        _set(group, [(name, named[name]) for name in members])
    optimizer.state.clear()
    # The numbers in a state_dict count the parameters of all groups.
    members = [named[name] for group in names for name in group]
    parts = {
        number: {key: part_like(value, members[number]) for key, value in state.items()}
        for number, state in packed["state"].items()
    }
    optimizer.load_state_dict({**packed, "state": parts})


def _set(group: dict[str, Any], members: list[tuple[str, Any]]) -> None:
    group["params"] = [parameter for _, parameter in members]
    if "param_names" in group:
        group["param_names"] = [name for name, _ in members]


def follow_structure(
    optimizer: torch.optim.Optimizer, model: nn.Module, change: StructureChanged, recipe: TrainingRecipe
) -> None:
    """Drop parameters that are gone, and add new ones to the groups that `recipe` puts them in.

    State of parameters that stay is kept. ValueError for a RepOptimizer: multipliers of new kernels are not defined.
    """
    if isinstance(optimizer, RepSGD | RepAdamW):
        raise ValueError(
            f"{type(optimizer).__name__} cannot follow a change of the network: it has no multipliers for it"
        )
    named = dict(model.named_parameters())
    alive = {id(parameter): name for name, parameter in named.items()}
    known = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            known.add(id(parameter))
            if id(parameter) not in alive:
                optimizer.state.pop(parameter, None)
        _set(group, [(alive[id(p)], p) for p in group["params"] if id(p) in alive])
    for wanted in parameter_groups(model, recipe):
        new = [(name, parameter) for name, parameter in wanted["params"] if id(parameter) not in known]
        if new:
            _join(optimizer, wanted, new)
    for parameter, state in change.state.items():
        optimizer.state[parameter] = dict(state)


def _join(optimizer: torch.optim.Optimizer, wanted: dict[str, Any], new: list[tuple[str, Any]]) -> None:
    groups = optimizer.param_groups
    fits = [g for g in groups if (g["weight_decay"], g.get(_FACTOR, 1.0)) == (wanted["weight_decay"], wanted[_FACTOR])]
    if fits:
        before = list(zip(fits[0].get("param_names", fits[0]["params"]), fits[0]["params"], strict=True))
        _set(fits[0], [*before, *new])
        return
    # The schedule sets the rate of a new group, from its peak.
    optimizer.add_param_group({**wanted, "params": new, "initial_lr": wanted["lr"]})
