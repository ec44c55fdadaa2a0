"""The buffers of a network before a step, to put back what a forward pass with bad values did to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repkern.train.slots import buffer_slots

__all__ = ["BufferSnapshot"]


class BufferSnapshot:
    """A batch with a NaN leaves the running statistics of every norm NaN for good, though its step is skipped."""

    def __init__(self, model: nn.Module) -> None:
        self._live = buffer_slots(model, (name for name, buffer in model.named_buffers() if buffer.numel()))
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        """Note how they are."""
        live = self._live.tensors()
        if [t.shape for t in live] != [t.shape for t in self._kept]:
            self._kept = [buffer.clone() for buffer in live]
        elif live:
            torch._foreach_copy_(self._kept, live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make them so again."""
        for (module, name), kept in zip(self._live.places, self._kept, strict=True):
            if module[name].shape == kept.shape:
                module[name].copy_(kept)
            else:
                module[name] = kept.clone()
