"""The buffers of a network before a step, to put back what a forward pass with bad values did to them."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["BufferSnapshot"]


class BufferSnapshot:
    """A batch with a NaN leaves the running statistics of every norm NaN for good, though its step is skipped."""

    def __init__(self, model: nn.Module) -> None:
        self._live = [buffer for buffer in model.buffers() if buffer.numel()]
        self._kept = [buffer.clone() for buffer in self._live]

    @torch.no_grad()
    def take(self) -> None:
        """Note how they are."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make them so again."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)
