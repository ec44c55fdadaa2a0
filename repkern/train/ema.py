"""A moving average of a network's weights, matched by name, so that it survives changes of the structure."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from repkern.train.callbacks import StructureChanged
from repkern.train.recipe import EMARecipe

__all__ = ["MovingAverage"]


class MovingAverage:
    """`module` holds decay * itself + (1 - decay) * the model's parameters; buffers are the model's own.

    Running statistics of norms are averages already and belong to the newest forward passes: they are copied.
    """

    def __init__(self, model: nn.Module, recipe: EMARecipe) -> None:
        self._recipe = recipe
        self.module = copy.deepcopy(model).eval()
        self.module.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After step number `step` (from 1). RuntimeError for a model of another structure."""
        if step % self._recipe.every:
            return
        own, theirs = dict(self.module.named_parameters()), dict(model.named_parameters())
        if own.keys() != theirs.keys():
            differing = sorted(own.keys() ^ theirs.keys())
            raise RuntimeError(
                f"the moving average and the model differ in {', '.join(differing[:4])}: after a change of the network "
                "call Trainer.structure_changed"
            )
        decay = self._recipe.decay
        if self._recipe.warmup:
            updates = step // self._recipe.every
            decay = min(decay, (1 + updates) / (10 + updates))
        average = get_ema_multi_avg_fn(decay)
        average([own[name] for name in own], [theirs[name].detach() for name in own], None)
        buffers = dict(model.named_buffers())
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])

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
