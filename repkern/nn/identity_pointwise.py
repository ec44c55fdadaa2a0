"""The 1x1 convolution whose parameter is its deviation from an identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repkern.nn._weight_hooks import current_weight

__all__ = ["IdentityPointwise"]


class IdentityPointwise(nn.Conv2d):
    """A 1x1 convolution [Cm, Ci/g, 1, 1] whose `weight` is the deviation from an identity (repeated for Cm > Ci)."""

    identity: Tensor
    _folds_whole = True

    def __init__(self, in_channels: int, out_channels: int, groups: int, factory: dict[str, Any]) -> None:
        super().__init__(in_channels, out_channels, 1, groups=groups, bias=False, **factory)
        self.register_buffer("identity", torch.zeros_like(self.weight), persistent=False)
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IdentityPointwise:
        before = self.identity.device.type
        super()._apply(fn, recurse)
        if before == "meta" != self.identity.device.type:  # to_empty: a constant that no state_dict brings back
            self._fill_identity()
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the 1x1 an identity."""
        if "identity" not in self._buffers:  # nn.Conv2d calls this before there is one
            return
        self._fill_identity()
        self.weight.zero_()

    def _fill_identity(self) -> None:
        at = torch.arange(self.out_channels, device=self.weight.device)
        inputs = at % (self.out_channels // self.groups) % (self.in_channels // self.groups)
        self.identity.zero_()
        self.identity[at, inputs] = 1

    def kernel(self) -> Tensor:
        """[Cm, Ci/g, 1, 1] with the identity."""
        return current_weight(self) + self.identity

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Cm, H, W]."""
        return functional.conv2d(x, self.weight + self.identity, groups=self.groups)
