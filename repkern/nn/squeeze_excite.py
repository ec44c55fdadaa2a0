"""Squeeze-excite, and blocks that have it around their activation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from repkern.nn.block import RepBlock
from repkern.nn.geometry import Geometry, check_dtype

__all__ = ["GATES", "SEBlock", "SqueezeExcite"]

GATES = ("sigmoid", "hardsigmoid")


class SqueezeExcite(nn.Module):
    """x * gate(up(relu(down(mean of x over all pixels)))), paper 1709.01507; `down` and `up` are 1x1 with bias.

    Any height and width (the released RepVGG code pools a W x W window, which is wrong unless H = W).
    x [N, C, H, W] -> the same shape. gate: one of `GATES`. ValueError for channel counts below 1 or another gate.
    """

    def __init__(
        self,
        channels: int,
        reduced_channels: int,
        *,
        gate: str = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_dtype(dtype)
        if channels < 1 or reduced_channels < 1:
            raise ValueError(
                f"squeeze-excite needs at least 1 channel, got {channels} channels reduced to {reduced_channels}"
            )
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
        self.down = nn.Conv2d(channels, reduced_channels, 1, device=device, dtype=dtype)
        self.up = nn.Conv2d(reduced_channels, channels, 1, device=device, dtype=dtype)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        pooled = x.mean((-2, -1), keepdim=True)
        excited = self.up(functional.relu(self.down(pooled)))
        return x * (torch.sigmoid(excited) if self.gate == "sigmoid" else functional.hardsigmoid(excited))

    def extra_repr(self) -> str:
        """The gate."""
        return f"gate={self.gate}"


class SEBlock(RepBlock):
    """A block whose convolution may be followed by `se`, then the activation, then `post_se`, each None when absent.

    se, post_se: the channels that the squeeze-excite reduces to. It is not linear, so it stays when the block is fused.
    """

    def __init__(
        self,
        geometry: Geometry,
        activation: nn.Module | None,
        se: int | None,
        post_se: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        check_dtype(dtype)
        super().__init__(geometry, activation)
        self.se, self.post_se = (
            None if reduced is None else SqueezeExcite(self.out_channels, reduced, device=device, dtype=dtype)
            for reduced in (se, post_se)
        )

    def _finish(self, y: Tensor) -> Tensor:
        """What the deployed form does behind its convolution."""
        y = y if self.se is None else self.se(y)
        y = self._activate(y)
        return y if self.post_se is None else self.post_se(y)

    def _after(self) -> dict[str, nn.Module]:
        after: dict[str, nn.Module] = {}
        if self.se is not None:
            after["se"] = copy.deepcopy(self.se)
        after |= super()._after()
        if self.post_se is not None:
            after["post_se"] = copy.deepcopy(self.post_se)
        return after
