"""RepGhostModule: a 1x1 convolution, then a depthwise one beside the identity, added instead of concatenated."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from repkern.nn.block import RepBlock
from repkern.nn.branch_sum import Branch
from repkern.nn.conv_norm_act import ConvNormAct
from repkern.nn.fold import KernelBias
from repkern.nn.geometry import Pair, check_geometry
from repkern.nn.normed_sum import NormedSumBlock, plain_conv

__all__ = ["GhostFusion", "RepGhostModule"]


class GhostFusion(NormedSumBlock):
    """activation( BN(depthwise KxK) [+ BN(x)] [+ x] ), the size kept: the second half of a RepGhostModule.

    norm_identity, raw_identity: which of the two identity branches there are.
    Submodules: `dense`, `dense_bn`, `identity_bn` (None when absent).
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Pair = 3,
        *,
        activation: nn.Module | None = None,
        dilation: Pair = 1,
        norm_identity: bool = True,
        raw_identity: bool = False,
        recompute: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, flag in (("norm_identity", norm_identity), ("raw_identity", raw_identity)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        geometry = check_geometry(channels, channels, kernel_size, dilation=dilation, groups=channels)
        super().__init__(geometry, activation, None, None, recompute, device, dtype)
        self.dense = plain_conv(geometry, device, dtype)
        self.dense_bn = nn.BatchNorm2d(channels, device=device, dtype=dtype)
        self.identity_bn = nn.BatchNorm2d(channels, device=device, dtype=dtype) if norm_identity else None
        self.raw_identity = raw_identity

    @property
    def _adds_input(self) -> bool:
        return self.raw_identity or super()._adds_input

    def _branches(self) -> list[Branch]:
        branches = [Branch(self.dense_bn, self.dense, cheap=True)]
        if self.identity_bn is not None:
            branches.append(Branch(self.identity_bn))
        return branches + ([Branch(None)] if self.raw_identity else [])

    def _folded_others(self, like: Tensor) -> list[KernelBias]:
        folded = self._folded_identity(like)
        return folded + ([(self._identity_kernel(like), None)] if self.raw_identity else [])


class RepGhostModule(nn.Module):
    """y = activation(BN(conv(x))), then activation( BN(depthwise(y)) [+ BN(y)] [+ y] ).

    The module of RepGhost (paper 2211.06088, Sec. 3.2): GhostNet's two halves added, which re-parameterizes, instead
    of concatenated. As there is an activation in between, it is two convolutions and no RepBlock; `fuse()` and
    `repkern.reparameterize` fold both, the first one's norm too (the released code leaves that).

    kernel_size, stride, padding (None keeps the size at stride 1), dilation, groups: the first convolution's (released:
    1x1). depthwise_size, depthwise_dilation: of the depthwise one, K odd. activation: a module or None; the first half
    gets a copy of its own. norm_identity, raw_identity: the branches beside the depthwise one (released: reparam_bn,
    reparam_identity). recompute: "cheap" makes the depthwise map again in the backward instead of keeping it.
    Submodules: `primary` (ConvNormAct), `fusion` (GhostFusion). Input [N, Ci, H, W] -> [N, Co, H', W']; ValueError for
    another, and for arguments that cannot be a module.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 1,
        stride: Pair = 1,
        padding: str | Pair | None = None,
        dilation: Pair = 1,
        groups: int = 1,
        *,
        activation: nn.Module | None = None,
        padding_mode: str = "zeros",
        recompute: str = "none",
        depthwise_size: Pair = 3,
        depthwise_dilation: Pair = 1,
        norm_identity: bool = True,
        raw_identity: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.primary: nn.Module = ConvNormAct(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            activation=copy.deepcopy(activation),
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.fusion: nn.Module = GhostFusion(
            out_channels,
            depthwise_size,
            activation=activation,
            dilation=depthwise_dilation,
            norm_identity=norm_identity,
            raw_identity=raw_identity,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Co, H', W']."""
        return self.fusion(self.primary(x))

    def fuse(self) -> nn.Module:
        """The plain modules: `primary` and `fusion` in an nn.Sequential, with the keys that reparameterize gives."""
        halves = {"primary": self.primary, "fusion": self.fusion}
        plain = OrderedDict(
            (name, half.fuse() if isinstance(half, RepBlock) else half) for name, half in halves.items()
        )
        fused = nn.Sequential(plain)
        fused.training = self.training
        return fused
