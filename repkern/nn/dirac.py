"""DiracConv2d: a convolution whose kernel is a scaled identity plus a normalized kernel; and its identity kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from repkern.nn.branch_weight import BranchWeight, require_writable, tensor_of, write_weight
from repkern.nn.geometry import Pair, check_dtype, check_geometry
from repkern.nn.kernel_conv import KernelConv2d

__all__ = ["DiracConv2d", "IdentityKernelConv2d"]


class IdentityKernelConv2d(KernelConv2d):
    """A convolution whose kernel is made of `deviation.weight` [Co, Ci/g, K, K] and of an identity, every step anew.

    The identity passes channel j of a group on to channel j, as far as there are such channels. Subclasses implement
    `kernel` and `_solve`. Arguments and attributes as nn.Conv2d; no norm inside. `weight` is the kernel, and may be
    written: see `KernelConv2d`. Parameter: bias [Co] or None.
    """

    deviation: BranchWeight
    identity: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dtype(dtype)
        super().__init__(
            check_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        )
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        own = torch.empty(shape, device=device, dtype=dtype)
        self.deviation = BranchWeight(own)
        self._register_bias(nn.Parameter(own.new_empty(self.out_channels)) if bias else None)
        self.register_buffer("identity", torch.zeros_like(own), persistent=False)
        self._register_scales(own.new_empty(self.out_channels))
        self.reset_parameters()

    def _register_scales(self, like: Tensor) -> None:
        """Parameters of the shape [Co] of `like`, where there are any."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IdentityKernelConv2d:
        before = self.identity.device.type
        super()._apply(fn, recurse)
        if before == "meta" != self.identity.device.type:  # to_empty: a constant that no state_dict brings back
            nn.init.dirac_(self.identity, self.groups)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of nn.Conv2d, and the identity."""
        nn.init.dirac_(self.identity, self.groups)
        nn.init.kaiming_uniform_(self.deviation.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.deviation.weight[0].numel())
            self.bias.uniform_(-bound, bound)


class DiracConv2d(IdentityKernelConv2d):
    """nn.Conv2d with the kernel diag(identity_scale) I + diag(scale) W / |W|, W normalized per output channel.

    The layer of DiracNet (paper 1706.00388, Eq. 2), a baseline of RepVGG (paper 2101.03697, Table 7). kernel_size: any
    odd K. Submodules that hold one parameter, `weight`, each: deviation [Co, Ci/g, K, K] (W), identity_scale [Co] from
    1, scale [Co] from 0.1. Parameter: bias [Co]. `weight` is the kernel.
    Input [N, Ci, H, W] or [Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    _earlier_names = {"weight": "deviation"}  # noqa: RUF012

    def _register_scales(self, like: Tensor) -> None:
        self.identity_scale = BranchWeight(torch.empty_like(like))
        self.scale = BranchWeight(torch.empty_like(like))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As published: scales 1 and 0.1, a normal `deviation`, whose length does not matter."""
        super().reset_parameters()
        nn.init.normal_(self.deviation.weight)
        self.identity_scale.weight.fill_(1)
        self.scale.weight.fill_(0.1)

    def kernel(self) -> Tensor:
        """[Co, Ci/g, K, K], with a gradient to every parameter but the bias."""
        own = tensor_of(self.deviation)
        wide = torch.promote_types(own.dtype, torch.float32)
        direction = functional.normalize(own.to(wide).flatten(1)).view_as(own)
        scaled = tensor_of(self.scale).to(wide)[:, None, None, None] * direction
        return (tensor_of(self.identity_scale).to(wide)[:, None, None, None] * self.identity + scaled).to(own.dtype)

    def _solve(self, weight: Tensor) -> None:
        rest = weight - tensor_of(self.identity_scale).double()[:, None, None, None] * self.identity
        length = rest.flatten(1).norm(dim=1)
        require_writable(self.deviation, self.scale)  # before either is
        before = tensor_of(self.deviation).double()
        write_weight(self.deviation, torch.where(length[:, None, None, None] > 0, rest, before))
        write_weight(self.scale, length)
