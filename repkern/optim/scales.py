"""Scales of a hyper-search by the name of their layer: which layers can have them, and whether they fit a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repkern.models.checkpoints.scales import SCALE_NAMES, named_as_in
from repkern.nn._follow import norms_after
from repkern.nn.block import RepBlock
from repkern.nn.conv_norm_act import ConvNormAct
from repkern.nn.csla import CSLABlock
from repkern.nn.geometry import check_geometry

__all__ = [
    "CONSTANTS",
    "INITIAL",
    "Layer",
    "LayerScales",
    "by_layer",
    "check_scales",
    "depths",
    "derived_scales",
    "initial_value",
    "is_default_choice",
    "layers_of",
    "unwrapped",
]

#: Where the constants of a RepOptimizer come from (paper, Table 4).
CONSTANTS = ("searched", "ones", "initial", "averaged")

#: How the scales of a search start: see `initial_value`.
INITIAL = ("paper", "released", "ones")

_LISTED = 8


class Layer(NamedTuple):
    """A convolution that can have scales.

    name: of the module whose name the scales bear; module: nn.Conv2d, ConvNormAct or CSLABlock; weight: its kernel
    [Co, Ci/g, K, K]. keeps_positions: whether the input itself can be a branch.
    """

    name: str
    module: nn.Module
    weight: Tensor
    groups: int
    keeps_positions: bool


class LayerScales(NamedTuple):
    """The scales [Co] of one layer; None for a branch it does not have."""

    dense_scale: Tensor
    pointwise_scale: Tensor | None
    identity_scale: Tensor | None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile holds. ValueError for DataParallel wrappers, whose copies would go apart."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ValueError(f"use the model before {type(model).__name__} wraps it: its names and copies depend on it")
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def layers_of(model: nn.Module) -> Iterator[Layer]:
    """Every convolution that can have scales, in the order of registration; those inside other blocks are theirs."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, RepBlock):
            inside |= {id(child) for child in module.modules()}
        layer = _as_layer(name, module)
        if layer is not None:
            yield layer


def _as_layer(name: str, module: Any) -> Layer | None:
    if isinstance(module, CSLABlock):
        return Layer(name, module, module.dense.weight, module.groups, module._keeps_positions)
    if isinstance(module, ConvNormAct):
        return Layer(name, module, module.conv.weight, module.groups, module._keeps_positions)
    if isinstance(module, RepBlock):
        return None  # its kernel is made of branches already, also where it is an nn.Conv2d
    if not isinstance(module, nn.Conv2d) or isinstance(module.weight, nn.parameter.UninitializedParameter):
        return None
    conv: Any = module
    try:
        checked = check_geometry(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.padding_mode,
        )
    except ValueError:  # an even or oblong kernel has no centre
        return None
    size = checked.dilation[0] * (checked.kernel_size[0] // 2), checked.dilation[1] * (checked.kernel_size[1] // 2)
    square = checked.in_channels == checked.out_channels and checked.stride == (1, 1)
    return Layer(name, module, module.weight, module.groups, square and checked.pad == size)


def is_default_choice(model: nn.Module) -> dict[str, bool]:
    """Layer -> whether a search takes it when nothing else is asked: trained 3x3 kernels that a BatchNorm follows."""
    plain = any(isinstance(layer.module, nn.Conv2d) for layer in layers_of(model))
    # Others that read the convolution's output do not matter: a search changes neither it nor the norm.
    followed = {conv for found in norms_after(model) for conv in found} if plain else set()
    return {
        layer.name: layer.weight.requires_grad
        and layer.weight.shape[-1] == 3
        and (not isinstance(layer.module, nn.Conv2d) or id(layer.module) in followed)
        for layer in layers_of(model)
    }


def depths(layers: list[Layer]) -> dict[str, int]:
    """Layer -> place in its stage, from 0. A layer that cannot have an identity branch begins a stage."""
    found: dict[str, int] = {}
    depth = 0
    for layer in layers:
        depth = depth + 1 if layer.keeps_positions and found else 0
        found[layer.name] = depth
    return found


def initial_value(rule: str | float, depth: int) -> float:
    """What the scales behind the convolutions of a layer start from; those of identity branches start from 1.

    "paper": sqrt(2 / l) with l = 1 for the first layer of a stage (Sec. 4.1). "released": 1 for the first layer, l = 1
    for the one after it (the released code, and Appendix B). "ones", or any other number.
    """
    if rule == "paper":
        return math.sqrt(2 / (depth + 1))
    if rule == "released":
        return math.sqrt(2 / depth) if depth else 1.0
    if rule == "ones":
        return 1.0
    if isinstance(rule, str) or not math.isfinite(rule) or rule == 0:
        raise ValueError(f"initial must be one of {', '.join(INITIAL)}, or a finite number that is not 0, got {rule!r}")
    return float(rule)


def by_layer(scales: Mapping[str, Tensor]) -> dict[str, LayerScales]:
    """Scales by name -> by layer. ValueError for names that are none, and layers without a dense_scale."""
    if not scales:
        raise ValueError("there are no scales")
    found: dict[str, dict[str, Tensor]] = {}
    for name, scale in scales.items():
        layer, _, part = name.rpartition(".")
        if part not in SCALE_NAMES:
            raise ValueError(f"scales are named LAYER.{' or LAYER.'.join(SCALE_NAMES)}, got {name!r}")
        if not isinstance(scale, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(scale).__name__}")
        found.setdefault(layer, {})[part] = scale
    bare = [layer for layer, parts in found.items() if "dense_scale" not in parts]
    if bare:
        raise ValueError(f"layers without a dense_scale: {_some(bare)}")
    return {layer: LayerScales(*(parts.get(name) for name in SCALE_NAMES)) for layer, parts in found.items()}  # type: ignore[arg-type]


def check_scales(
    scales: Mapping[str, Tensor], model: nn.Module, *, strict: bool = True
) -> dict[str, tuple[Layer, LayerScales]]:
    """The scales beside their layers in `model`. ValueError that lists the first mismatches.

    Mismatches: a layer the model does not have, another number of channels, an identity where there can be none, a
    value that is not finite; with `strict` also branches without a scale where other layers have one, and layers of the
    kind that has scales (kernel size, depthwise or not) which a search would have chosen and which have none.
    """
    given = by_layer(named_as_in(model, scales))
    present = {layer.name: layer for layer in layers_of(model)}
    problems = [f"{name}: the model has no such convolution" for name in given if name not in present]
    for name, own in given.items():
        if name in present:
            problems += [f"{name}.{problem}" for problem in _misfits(own, present[name])]
    missing = list(_missing(given, present, model)) if strict else []
    problems += missing
    if problems:
        listed = "\n  ".join(problems[:_LISTED] + (["..."] if len(problems) > _LISTED else []))
        raise ValueError(
            f"the scales are not for this {type(model).__name__} ({len(problems)} mismatches):\n  {listed}"
            + ("\nstrict=False accepts layers and branches without scales." if missing else "")
        )
    return {name: (present[name], own) for name, own in given.items()}


def _missing(given: Mapping[str, LayerScales], present: Mapping[str, Layer], model: nn.Module) -> Iterator[str]:
    """What a search of this model would have found, going by the scales that there are."""
    kinds = {_kind(present[name]) for name in given if name in present}
    parts = [part for part in SCALE_NAMES if any(getattr(own, part) is not None for own in given.values())]
    bare = [name for name, layer in present.items() if name not in given and _kind(layer) in kinds]
    default = is_default_choice(model) if bare else {}
    for name, layer in present.items():
        own = given.get(name)
        if own is None:
            if default.get(name):
                yield f"{name}: no scales, but other layers of its kind have them"
            continue
        possible = {"identity_scale": layer.keeps_positions, "pointwise_scale": layer.weight.shape[-1] > 1}
        for part in parts:
            if getattr(own, part) is None and possible.get(part, True):
                yield f"{name}.{part}: missing, but other layers have one"


def _misfits(own: LayerScales, layer: Layer) -> Iterator[str]:
    channels = layer.weight.shape[0]
    for part, scale in zip(SCALE_NAMES, own, strict=True):
        if scale is None:
            continue
        if tuple(scale.shape) != (channels,):
            yield f"{part} {tuple(scale.shape)}: the model's convolution has {channels} channels"
        elif not torch.isfinite(scale).all():
            channel = int((~torch.isfinite(scale)).nonzero()[0])
            yield f"{part} is {scale[channel].item()} for channel {channel}"
    if own.identity_scale is not None and not layer.keeps_positions:
        yield "identity_scale: the model's convolution cannot have an identity beside it"


def _kind(layer: Layer) -> tuple[str, int]:
    """What layers share for all of them to have scales where one has: RepOpt-GhostNet has them in its fusions only."""
    depthwise = layer.groups == layer.weight.shape[0] > 1
    return (layer.name.rpartition(".")[2] if depthwise else ""), layer.weight.shape[-1]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def derived_scales(
    scales: Mapping[str, Tensor], constants: str, model: nn.Module | None = None, *, initial: str | float = "paper"
) -> dict[str, Tensor]:
    """The scales with the constants of an ablation in their place (paper, Table 4); names and shapes stay.

    constants: "searched" (unchanged), "ones", "initial" (as a search of `model` starts, by the rule `initial`) or
    "averaged" (the mean over the channels of each scale). ValueError for another.
    """
    if constants not in CONSTANTS:
        raise ValueError(f"constants must be one of {', '.join(CONSTANTS)}, got {constants!r}")
    if constants == "initial":
        if model is None:
            raise ValueError("constants='initial' depend on the layers' depth: a model is needed")
        scales = named_as_in(model, scales)
        given = by_layer(scales)
        depth = depths([layer for layer in layers_of(model) if layer.name in given])
    changed: dict[str, Tensor] = {}
    for name, scale in scales.items():
        layer, _, part = name.rpartition(".")
        if constants == "ones" or (constants == "initial" and part == "identity_scale"):
            changed[name] = torch.ones_like(scale)
        elif constants == "initial":
            changed[name] = torch.full_like(scale, initial_value(initial, depth[layer]))
        else:
            changed[name] = scale.mean().expand_as(scale).clone() if constants == "averaged" else scale.clone()
    return changed
