"""What follows from shapes alone: checked and worked out once per combination of shapes, then looked up.

A training step calls each layer with the shapes of the step before; without the cache the checks and the pointer
bookkeeping cost more Python time than a small layer's arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repkern.ops.orepa_squeeze.layers import (
    GRADIENT_FIELDS,
    INTS_PER_LAYER,
    SqueezeBranches,
    check_layers,
    kernel_shape,
)

__all__ = ["LayerPlan", "Plan", "differentiable", "plan_of"]

_MOST_PLANS = 4096  # a model has one per call; more than this means shapes that never return


class LayerPlan(NamedTuple):
    """One layer. A slot is a position in the call's tensor list, -1 for an absent tensor."""

    shape: tuple[int, int, int, int]
    integers: list[int]  # Co, Ci, Cm, groups, K, expansion, identity_reduce: as in csrc/orepa_squeeze/orepa_squeeze.h
    slots: list[int]  # origin ... project
    scale: int
    scale_offsets: list[int]  # elements from the start of `scale` to each branch's row, -1 for an absent branch
    prior_filter: int
    has_unused_scales: bool


class Plan(NamedTuple):
    """All layers of a call, and which of its tensors get a gradient."""

    layers: list[LayerPlan]
    differentiable: list[bool]


def differentiable(layout: Sequence[int]) -> list[bool]:
    """For each tensor of a call, whether it gets a gradient: all but the prior filters."""
    answer: list[bool] = []
    for mask in layout[::INTS_PER_LAYER]:
        answer += [field < len(GRADIENT_FIELDS) for field in range(mask.bit_length()) if mask >> field & 1]
    return answer


_plans: dict[tuple[object, ...], Plan] = {}


def plan_of(tensors: Sequence[Tensor], layout: Sequence[int]) -> Plan:
    """Check the call (ValueError, TypeError) and return its plan."""
    if not tensors:
        check_layers(tensors, layout)
    first = tensors[0]
    dtype, device = first.dtype, first.device
    shapes = tuple([t.shape for t in tensors])
    uniform = all([t.dtype is dtype and t.device == device and t.layout is torch.strided for t in tensors])
    key = (tuple(layout), dtype, device, shapes)
    try:
        known = _plans.get(key) if uniform else None
    except TypeError:  # symbolic shapes under torch.compile cannot be hashed
        return _make(check_layers(tensors, layout), layout)
    if known is None:
        known = _make(check_layers(tensors, layout), layout)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = known
    return known


def _make(layers: Sequence[SqueezeBranches], layout: Sequence[int]) -> Plan:
    plans: list[LayerPlan] = []
    tensors = 0
    for layer in layers:
        slots: list[int] = []
        for tensor in layer[:10]:
            slots.append(-1 if tensor is None else tensors)
            tensors += tensor is not None
        plans.append(_layer_plan(layer, slots))
    return Plan(plans, differentiable(layout))


def _layer_plan(layer: SqueezeBranches, slots: list[int]) -> LayerPlan:
    co, cig, k, _ = kernel_shape(layer)
    ci = cig * layer.groups
    internal = 0 if layer.reduce is None else layer.reduce.shape[0]
    expansion = 0 if layer.depthwise is None else layer.depthwise.shape[0] // ci
    rows = layer.scale_positions()
    return LayerPlan(
        shape=(co, cig, k, k),
        integers=[co, ci, internal, layer.groups, k, expansion, int(layer.identity_reduce)],
        slots=slots[:8],
        scale=slots[8],
        scale_offsets=[-1 if row is None else row * co for row in rows],
        prior_filter=slots[9],
        has_unused_scales=layer.scale is not None and layer.scale.shape[0] != sum(layer.present),
    )
