"""Which parameters weight decay is for."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from repkern.nn.orepa import OREPAConv2d

__all__ = ["weight_decay_groups"]

# A norm or scale in an identity branch is the weight of that branch, as a kernel is of its own.
_IDENTITIES = ("identity_scale.weight", "identity_bn.weight", "identity.weight")


def weight_decay_groups(model: nn.Module, weight_decay: float, *, decay_scales: bool = False) -> list[dict[str, Any]]:
    """Parameter groups of `model` for any optimizer: kernels decay; biases, norms and other vectors do not.

    Scales and norms of identity branches decay, as in the training of RepVGG and of RepOptimizers' searches.
    decay_scales: whether the scales of OREPA's branches decay too, as in its released training. Parameters that
    require no gradient are left out; names are kept. ValueError for a weight_decay that is negative or not finite,
    and for a model with nothing to train.
    """
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be zero or more, got {weight_decay}")
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    scales = {id(p) for m in model.modules() if isinstance(m, OREPAConv2d) and m.scale for p in m.scale.parameters()}
    decayed = [
        (n, p)
        for n, p in named
        if (p.dim() > 1 and not n.endswith(".bias")) or n.endswith(_IDENTITIES) or (decay_scales and id(p) in scales)
    ]
    kept = {name for name, _ in decayed}
    groups = [(decayed, float(weight_decay)), ([(n, p) for n, p in named if n not in kept], 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]
