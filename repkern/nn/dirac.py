"""DiracConv2d: a convolution whose kernel is a scaled identity plus a normalized kernel; and its identity kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from repkern.nn.block import RepBlock
from repkern.nn.fold import KernelBias
from repkern.nn.geometry import Pair, check_dtype, check_geometry

__all__ = ["DiracConv2d", "IdentityKernelConv2d"]


class IdentityKernelConv2d(RepBlock):
    """A convolution whose kernel is made of `weight` [Co, Ci/g, K, K] and of an identity, every step anew.

    The identity passes channel j of a group on to channel j, as far as there are such channels. Subclasses implement
    `kernel` and `_solve`. Arguments and attributes as nn.Conv2d; no norm inside. Parameters: weight, bias [Co] or None.
    """

    has_norm = False

    weight: nn.Parameter
    bias: nn.Parameter | None
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
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("identity", torch.zeros_like(self.weight), persistent=False)
        self._register_scales(self.weight[:, 0, 0, 0].detach())
        self.reset_parameters()

    def _register_scales(self, like: Tensor) -> None:
        """Parameters of the shape [Co] of `like`, where there are any."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of nn.Conv2d, and the identity."""
        nn.init.dirac_(self.identity, self.groups)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            self.bias.uniform_(-bound, bound)

    @property
    def _deployed_bias(self) -> bool:
        return self.bias is not None

    def kernel(self) -> Tensor:
        """[Co, Ci/g, K, K], with a gradient to every parameter but the bias."""
        raise NotImplementedError

    def _solve(self, weight: Tensor) -> None:
        """Change the parameters so that `kernel()` gives `weight`, which is in float64."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[(N,) Ci, H, W] -> [(N,) Co, H', W']."""
        return self._conv(x, self.kernel(), self.bias)

    def _fold(self) -> KernelBias:
        return self.kernel(), self.bias

    @torch.no_grad()
    def set_equivalent_kernel_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        """Solve for the parameters. ValueError for a bias where the block has none."""
        if self.bias is None and bias is not None and bias.any():
            raise ValueError(f"{type(self).__name__} without a bias cannot take over one")
        self._solve(weight.double())
        if self.bias is not None:
            self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias)

    @torch.no_grad()
    def set_kernel_before_norm(self, weight: Tensor, bias: Tensor | None) -> None:
        """The same: there is no norm inside."""
        self.set_equivalent_kernel_bias(weight, bias)


class DiracConv2d(IdentityKernelConv2d):
    """nn.Conv2d with the kernel diag(identity_scale) I + diag(scale) W / |W|, W normalized per output channel.

    The layer of DiracNet (paper 1706.00388, Eq. 2), a baseline of RepVGG (paper 2101.03697, Table 7). kernel_size: any
    odd K. Parameters: weight [Co, Ci/g, K, K], identity_scale [Co] from 1, scale [Co] from 0.1, bias [Co].
    Input [N, Ci, H, W] or [Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    def _register_scales(self, like: Tensor) -> None:
        self.identity_scale = nn.Parameter(torch.empty_like(like))
        self.scale = nn.Parameter(torch.empty_like(like))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As published: scales 1 and 0.1, a normal `weight`, whose length does not matter."""
        super().reset_parameters()
        nn.init.normal_(self.weight)
        self.identity_scale.fill_(1)
        self.scale.fill_(0.1)

    def kernel(self) -> Tensor:
        """[Co, Ci/g, K, K], with a gradient to every parameter but the bias."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        direction = functional.normalize(self.weight.to(wide).flatten(1)).view_as(self.weight)
        scaled = self.scale.to(wide)[:, None, None, None] * direction
        return (self.identity_scale.to(wide)[:, None, None, None] * self.identity + scaled).to(self.weight.dtype)

    def _solve(self, weight: Tensor) -> None:
        rest = weight - self.identity_scale.double()[:, None, None, None] * self.identity
        length = rest.flatten(1).norm(dim=1)
        self.scale.copy_(length)
        self.weight.copy_(torch.where(length[:, None, None, None] > 0, rest, self.weight.double()))
