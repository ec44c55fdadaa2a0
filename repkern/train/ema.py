"""A moving average of a network's weights, matched by name, so that it survives changes of the structure."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from repkern.train.callbacks import StructureChanged
from repkern.train.recipe import EMARecipe
from repkern.train.slots import Slots, buffer_slots, parameter_slots

__all__ = ["MovingAverage"]


class MovingAverage:
    """`module` holds decay * itself + (1 - decay) * the model's parameters; buffers are the model's own.

    Running statistics of norms are averages already and belong to the newest forward passes: they are copied.
    """

    def __init__(self, model: nn.Module, recipe: EMARecipe) -> None:
        self._recipe = recipe
        self.module = copy.deepcopy(model).eval()
        self.module.requires_grad_(False)
        self._pairs: list[tuple[Slots, Slots]] = []

    def attach(self, model: nn.Module) -> None:
        """Average `model` from here on. RuntimeError when it has another structure than `module`.

        To be called again after a change of either: `update` looks nothing up by name.
        """
        self._pairs = []
        for kind, slots in (("parameters", parameter_slots), ("buffers", buffer_slots)):
            own, theirs = ([name for name, _ in getattr(m, f"named_{kind}")()] for m in (self.module, model))
            differing = sorted(set(own) ^ set(theirs))
            if differing:
                raise RuntimeError(
                    f"the moving average and the model differ in {', '.join(differing[:4])}: after a change of the "
                    "network call Trainer.structure_changed"
                )
            self._pairs.append((slots(self.module, own), slots(model, own)))

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Hold the parameters of `model`."""
        theirs = dict(model.named_parameters())
        for name, parameter in self.module.named_parameters():
            parameter.copy_(theirs[name])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step` (from 1) of the attached model."""
        if step % self._recipe.every:
            return
        (parameters, their_parameters), (buffers, their_buffers) = self._pairs
        decay = self._recipe.decay
        if self._recipe.warmup:
            updates = step // self._recipe.every
            decay = min(decay, (1 + updates) / (10 + updates))
        average = get_ema_multi_avg_fn(decay)
        average(parameters.tensors(), [parameter.detach() for parameter in their_parameters.tensors()], None)
        if buffers.places:
            torch._foreach_copy_(buffers.tensors(), their_buffers.tensors())

    def follow(self, model: nn.Module, change: StructureChanged) -> None:
        """Make the change that was made on `model`."""
        if change.replay is not None:
            change.replay(self.module)
        for path in () if change.replay is not None else change.paths:
            new = copy.deepcopy(model.get_submodule(path))
            if not path:
                self.module = new
                continue
            parent, _, last = path.rpartition(".")
            setattr(self.module.get_submodule(parent), last, new)
        self.module.eval().requires_grad_(False)
