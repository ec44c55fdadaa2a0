"""HyperSearch: the scales of a RepOptimizer as trained parameters of a network (paper 2205.15242, Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from repkern.models.checkpoints.scales import SCALE_NAMES, named_as_in
from repkern.nn._surgery import copied_model, replace_modules
from repkern.nn.conv_norm_act import ConvNormAct
from repkern.nn.convert import _why_not
from repkern.nn.csla import CSLABlock
from repkern.nn.csla_conv import CSLAConv2d
from repkern.optim.decay import weight_decay_groups
from repkern.optim.scales import Layer, check_scales, depths, initial_value, is_default_choice, layers_of, unwrapped

__all__ = ["HyperSearch"]

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]


class HyperSearch:
    """Train `model` by any loop on the search data; then `scales()` are what `repkern.optim.from_scales` takes.

    model: the target network, any nn.Module. Each chosen convolution becomes a CSLA block (the KxK kernel it has, a
    fresh 1x1 and the identity where there can be one), with a trained scale per channel behind every branch; a norm
    that follows stays. `search.model` is a copy unless `inplace`; blocks that are there already are used.
    where: which convolutions: names with wildcards ("stages.*", several in a list), or a function of name and module.
    None: every trained 3x3 kernel that a BatchNorm follows.
    initial: how the scales behind convolutions start: "paper" (sqrt(2 / l) by the depth l in the stage), "released"
    (one layer later), "ones", a number, or scales of an earlier search. Identities start at 1.
    pointwise, identity: whether there is a 1x1 branch, and an identity; RepOpt-GhostNet has none of the first.

    Attributes: `model`; `layers`, the names of the chosen convolutions; `history`, one dictionary per `epoch_end()`.
    It owns no files: `state_dict()` goes into a checkpoint beside the model's and the optimizer's.
    ValueError for a wrapped model, convolutions that cannot be chosen, patterns without a match, and if there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        where: Where | None = None,
        initial: str | float | Mapping[str, Tensor] = "paper",
        pointwise: bool = True,
        identity: bool = True,
        inplace: bool = False,
    ) -> None:
        model = unwrapped(model)
        self.model = model if inplace else copied_model(model)
        chosen = _chosen(self.model, where)
        depth = depths(chosen)
        rule = 1.0 if isinstance(initial, Mapping) else initial
        new = {
            id(layer.module): _block(layer, initial_value(rule, depth[layer.name]), pointwise, identity)
            for layer in chosen
        }
        self.model = replace_modules(
            self.model,
            lambda name, module: new.get(id(module)),
            is_leaf=lambda module: isinstance(module, CSLABlock),
        )
        self.layers: tuple[str, ...] = tuple(layer.name for layer in chosen)
        self.history: list[dict[str, float]] = []
        self._steps = 0
        if isinstance(initial, Mapping):
            self._start_from(initial)

    @torch.no_grad()
    def _start_from(self, scales: Mapping[str, Tensor]) -> None:
        check_scales(scales, self.model, strict=False)
        scales = named_as_in(self.model, scales)
        own = dict(self._parameters())
        strangers = sorted(set(own) ^ set(scales))
        if strangers:
            raise ValueError(f"initial scales and layers differ ({len(strangers)}), first in {strangers[0]}")
        for name, parameter in own.items():
            parameter.copy_(scales[name])

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        found = []
        for name in self.layers:
            block = self.model.get_submodule(name)
            for part in SCALE_NAMES:
                scale = getattr(block, part)
                if scale is not None:
                    found.append((f"{name}.{part}" if name else part, scale.weight))
        return found

    def scales(self) -> dict[str, Tensor]:
        """The scales [Co] as they are now, by name: LAYER.dense_scale, .pointwise_scale and .identity_scale. Copies."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters()}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For the loop's optimizer: kernels and scales of identities decay, the other scales, norms and biases not."""
        return weight_decay_groups(self.model, weight_decay)

    def step(self) -> None:
        """After each step of the loop's optimizer."""
        self._steps += 1

    def epoch_end(self) -> None:
        """After each epoch: notes the steps done and the mean of every scale in `history` (paper, Fig. 6)."""
        with torch.no_grad():
            means = torch.stack([parameter.double().mean() for _, parameter in self._parameters()]).tolist()
        row = {name: mean for (name, _), mean in zip(self._parameters(), means, strict=True)}
        self.history.append({"steps": float(self._steps), **row})

    def state_dict(self) -> dict[str, Any]:
        """What a resumed search needs beside the model's and the optimizer's own: lists, strings and numbers."""
        return {"layers": list(self.layers), "steps": self._steps, "history": [dict(row) for row in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. ValueError for the state of a search of other layers."""
        if list(state["layers"]) != list(self.layers):
            differing = sorted(set(state["layers"]) ^ set(self.layers)) or ["their order"]
            raise ValueError(
                f"the state is of a search of {len(state['layers'])} layers, this one has {len(self.layers)}; they "
                f"differ in {', '.join(differing[:8])}"
            )
        self._steps = int(state["steps"])
        self.history = [dict(row) for row in state["history"]]

    def __repr__(self) -> str:
        return f"HyperSearch({type(self.model).__name__}, {len(self.layers)} layers, {len(self.history)} epochs)"


def _chosen(model: nn.Module, where: Where | None) -> list[Layer]:
    layers = list(layers_of(model))
    if where is None:
        default = is_default_choice(model)
        chosen = [layer for layer in layers if default[layer.name] and _refusal(layer, model) is None]
        if not chosen:
            raise ValueError(
                f"{type(model).__name__} has no trained 3x3 convolution that a BatchNorm follows, among "
                f"{len(layers)} convolutions: say `where`"
            )
        return chosen
    if callable(where):
        chosen = [layer for layer in layers if where(layer.name, layer.module)]
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        idle = [p for p in patterns if not any(fnmatchcase(layer.name, p) for layer in layers)]
        if idle:
            names = ", ".join(layer.name for layer in layers[:8])
            raise ValueError(f"{idle[0]!r} matches no convolution of {type(model).__name__}; it has {names}, ...")
        chosen = [layer for layer in layers if any(fnmatchcase(layer.name, p) for p in patterns)]
    if not chosen:
        raise ValueError(f"`where` picks none of the {len(layers)} convolutions of {type(model).__name__}")
    for layer in chosen:
        reason = _refusal(layer, model)
        if reason is not None:
            raise ValueError(f"{layer.name or 'the model'} cannot be searched: {reason}")
    return chosen


def _refusal(layer: Layer, model: nn.Module) -> str | None:
    """Why a convolution cannot get branches; None when it can."""
    if not layer.weight.requires_grad:
        return "its weight requires no gradient"
    return _why_not(layer.module, model) if isinstance(layer.module, nn.Conv2d) else None


@torch.no_grad()
def _block(layer: Layer, value: float, pointwise: bool, identity: bool) -> CSLABlock:
    module: Any = layer.module
    options: dict[str, Any] = {"train_scales": "all", "dense_scale": value, "pointwise_scale": value}
    if isinstance(module, CSLABlock):
        block = module
        for name, start in zip(SCALE_NAMES, (value, value, 1.0), strict=True):
            scale = getattr(block, name)
            if scale is not None:
                scale.weight.fill_(start)
                scale.weight.requires_grad_(True)
        block.train_scales = "all"
    elif isinstance(module, ConvNormAct):
        block = _csla(module, options)
        block.bn = module.bn
    else:
        block = CSLAConv2d.from_conv(module, **options)
        block.bias = module.bias
    block.dense.weight.copy_(layer.weight)
    if not pointwise:
        block.pointwise = block.pointwise_scale = None
    if not identity:
        block.identity_scale = None
    if block is not module:
        block.training = block.dense.training = module.training
        if block.pointwise is not None:
            block.pointwise.training = module.training
    return block


def _csla(module: ConvNormAct, options: dict[str, Any]) -> CSLABlock:
    block = CSLABlock.from_conv(module.conv, activation=module.activation, **options)
    assert isinstance(block, CSLABlock)
    return block
