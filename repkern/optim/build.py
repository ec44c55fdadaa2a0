"""from_scales: a RepOptimizer for a network of the user's, from what a hyper-search found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn.csla import CSLABlock
from repkern.optim.adamw import RepAdamW
from repkern.optim.decay import weight_decay_groups
from repkern.optim.files import load_scales
from repkern.optim.grad_mult import GradMult
from repkern.optim.initialize import initialize_kernel
from repkern.optim.scales import Layer, LayerScales, check_scales, derived_scales, unwrapped
from repkern.optim.sgd import RepSGD

__all__ = ["INITIALIZE", "OPTIMIZERS", "from_scales", "grad_mults", "reinitialize"]

OPTIMIZERS = {"sgd": RepSGD, "adamw": RepAdamW}

#: How the kernels start: Eq. 4 of the paper, Eq. 4 with the trained identity scales in place of 1, as they are.
INITIALIZE = ("scales", "trained_identity", "none")


def from_scales(
    model: nn.Module,
    scales: Mapping[str, Tensor] | str | Path,
    *,
    optimizer: str = "sgd",
    lr: float,
    weight_decay: float = 0.0,
    params: Iterable[Any] | None = None,
    initialize: str = "scales",
    multiply: bool = True,
    constants: str = "searched",
    initial: str | float = "paper",
    strict: bool = True,
    generator: torch.Generator | None = None,
    **options: Any,
) -> RepSGD | RepAdamW:
    """Start the kernels of `model` by the scales and return the RepOptimizer that trains it (paper 2205.15242).

    model: the plain target network, freshly made, its BatchNorms as they are; before DistributedDataParallel wraps it.
    scales: by name (`HyperSearch.scales()`), or a file for `load_scales`. optimizer: "sgd" or "adamw".
    params: parameter groups of the optimizer; None: those of `weight_decay_groups(model, weight_decay)`. options: other
    arguments of `RepSGD` (momentum, nesterov, ...) or `RepAdamW` (betas, released, ...).
    initialize: one of `INITIALIZE`; 1x1 kernels are drawn from `generator`, or torch's own. multiply=False trains with
    the plain optimizer. constants, initial: see `derived_scales`; together these are the ablations of Table 4.
    strict: scales must be there for every layer that a search would have chosen.

    A run that is resumed needs no scales: an optimizer made from parameters alone gets the multipliers by
    `load_state_dict`. ValueError for scales of another network (the first mismatches are listed), with a value that is
    not finite, a wrapped model, and unknown options; the model is then as it was.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if initialize not in INITIALIZE:
        raise ValueError(f"initialize must be one of {', '.join(INITIALIZE)}, got {initialize!r}")
    inner = unwrapped(model)
    if isinstance(scales, str | Path):
        scales = load_scales(scales, inner, strict=strict)
    layers = check_scales(scales, inner, strict=strict)
    _only_plain(layers)
    if constants != "searched":
        layers = check_scales(derived_scales(scales, constants, inner, initial=initial), inner, strict=strict)
    mults = _mults(layers)
    groups = weight_decay_groups(inner, weight_decay) if params is None else list(params)
    made = OPTIMIZERS[optimizer](groups, lr, weight_decay=weight_decay, grad_mults=mults if multiply else {}, **options)
    if initialize != "none":
        _initialize(layers, initialize == "trained_identity", generator)
    return made


def grad_mults(model: nn.Module, scales: Mapping[str, Tensor], *, strict: bool = True) -> dict[Tensor, GradMult]:
    """Weight -> its GradMult, for `RepSGD(..., grad_mults=...)`. ValueError for scales of another network."""
    layers = check_scales(scales, unwrapped(model), strict=strict)
    _only_plain(layers)
    return _mults(layers)


def reinitialize(
    model: nn.Module,
    scales: Mapping[str, Tensor],
    *,
    trained_identity: bool = False,
    strict: bool = True,
    generator: torch.Generator | None = None,
) -> None:
    """The Rule of Initialization alone (paper, Eq. 4): fresh kernels of `model` become those of its CSLA blocks.

    trained_identity: the identity's scales are those of the search instead of 1. ValueError for scales of another
    network.
    """
    layers = check_scales(scales, unwrapped(model), strict=strict)
    _only_plain(layers)
    _initialize(layers, trained_identity, generator)


_Layers = Mapping[str, tuple[Layer, LayerScales]]


def _only_plain(layers: _Layers) -> None:
    branched = [name for name, (layer, _) in layers.items() if isinstance(layer.module, CSLABlock)]
    if branched:
        raise ValueError(
            f"{branched[0] or 'the model'} has the branches that a RepOptimizer stands for: give the plain network, "
            "not the one that was searched"
        )


def _mults(layers: _Layers) -> dict[Tensor, GradMult]:
    found: dict[Tensor, GradMult] = {}
    for name, (layer, own) in layers.items():
        has_identity = own.identity_scale is not None
        try:
            found[layer.weight] = GradMult(own.dense_scale, own.pointwise_scale, has_identity, layer.groups)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    return found


def _initialize(layers: _Layers, trained_identity: bool, generator: torch.Generator | None) -> None:
    for layer, own in layers.values():
        identity = own.identity_scale
        if identity is not None and not trained_identity:
            identity = torch.ones_like(identity)
        initialize_kernel(
            layer.weight, own.dense_scale, own.pointwise_scale, identity, groups=layer.groups, generator=generator
        )
