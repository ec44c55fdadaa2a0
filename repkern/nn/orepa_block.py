"""Blocks of one squeezed convolution, its post-addition norm and an activation: OREPABlock and OREPADeepStem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn._weight_hooks import weight_in_forward
from repkern.nn.block import RepBlock
from repkern.nn.branch_sum import Branch, branch_norm_sum
from repkern.nn.fold import KernelBias, compose_sequential, fuse_bn
from repkern.nn.geometry import Geometry, Pair, check_dtype, check_geometry
from repkern.nn.normed_sum import set_kernel, wide_kernel
from repkern.nn.orepa import OREPAConv2d

__all__ = ["FACTORS", "OREPABlock", "OREPADeepStem"]

FACTORS = ("orepa", "plain")


class _NormedBlock(RepBlock):
    """One convolution, then a BatchNorm `bn`, then the activation."""

    def __init__(
        self,
        geometry: Geometry,
        activation: nn.Module | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        check_dtype(dtype)
        super().__init__(geometry, activation)
        self.bn: nn.Module = nn.BatchNorm2d(geometry.out_channels, device=device, dtype=dtype)

    def adopt_norm(self, norm: nn.Module) -> bool:
        """Use the given BatchNorm, with its statistics, as `bn`."""
        self.bn = norm
        return True

    def _convolved(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Co, H', W']."""
        self._check_input(x)
        return branch_norm_sum(x, [Branch(self.bn, self._convolved)], self.activation)

    def _wide_kernel(self) -> Tensor:
        """[Co, Ci/g, K, K] before the norm, in at least float32."""
        raise NotImplementedError

    def _fold(self) -> KernelBias:
        dtype = next(p.dtype for name, p in self.named_parameters() if not name.startswith("bn."))
        weight, bias = fuse_bn(self._wide_kernel(), None, self.bn)
        return weight.to(dtype), bias.to(dtype)

    def _set_kernel(self, weight: Tensor) -> None:
        """Make `weight` [Co, Ci/g, K, K] the kernel before the norm. ValueError for blocks that cannot."""
        RepBlock.set_equivalent_kernel_bias(self, weight, None)

    @torch.no_grad()
    def set_equivalent_kernel_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        """Solve for the kernel before the norm and the norm's shift; exact in eval mode.

        ValueError where the norm scales by 0.
        """
        norm: Any = self.bn
        factor, shift = fuse_bn(torch.ones_like(norm.running_mean), None, norm)
        if not factor.all():
            raise ValueError("the norm scales a channel by 0, so no kernel before it gives the wanted one")
        self._set_kernel(weight.double() / factor.double()[:, None, None, None])
        norm.bias.add_(-shift if bias is None else bias - shift)

    @torch.no_grad()
    def set_kernel_before_norm(self, weight: Tensor, bias: Tensor | None) -> None:
        """The convolution before an adopted norm; its bias moves into the running mean, which is where it shows."""
        self._set_kernel(weight)
        norm: Any = self.bn
        if bias is not None and norm.running_mean is not None:
            norm.running_mean.sub_(bias)


class OREPABlock(_NormedBlock):
    """activation(BatchNorm(OREPAConv2d(x))): the block of paper 2204.00826, Fig. 6, with its post-addition norm.

    kernel_size: any odd K >= 1. padding: None keeps the size at stride 1. activation: a module or None. The rest as
    OREPAConv2d, which is the submodule `conv` (no bias); the norm is `bn`.
    Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair | None = None,
        dilation: Pair = 1,
        groups: int = 1,
        *,
        activation: nn.Module | None = None,
        padding_mode: str = "zeros",
        scaling: str = "vector",
        internal_channels: int | None = None,
        expansion: int = 8,
        initial: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        super().__init__(geometry, activation, device, dtype)
        self.conv = OREPAConv2d(
            *geometry[:7],
            bias=False,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
            scaling=scaling,
            internal_channels=internal_channels,
            expansion=expansion,
            initial=initial,
        )

    def _convolved(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def _wide_kernel(self) -> Tensor:
        return wide_kernel(self.conv)

    def _set_kernel(self, weight: Tensor) -> None:
        set_kernel(self.conv, weight)


class OREPADeepStem(_NormedBlock):
    """activation(BatchNorm(conv)) whose K x K kernel is the composition of stacked 3x3 convolutions (paper, Sec. 3.5).

    kernel_size: odd K >= 5, from (K - 1) / 2 factors; the first maps Ci -> Co, the others Co -> Co, all with `groups`.
    factors: "orepa" (each factor is an OREPA kernel, as in the paper), "plain", or one of them per factor.
    The composition is the true one: equal to the stacked convolutions without padding in between (the released code
    composes by cross-correlation instead; `repkern.load_checkpoint` flips its factors). The submodules `factors` hold
    the kernels [.., .., 3, 3], the norm is `bn`. padding: None keeps the size at stride 1.
    ValueError for arguments that cannot be a stem.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair | None = None,
        dilation: Pair = 1,
        groups: int = 1,
        *,
        activation: nn.Module | None = None,
        padding_mode: str = "zeros",
        factors: str | Sequence[str] = "orepa",
        scaling: str = "vector",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        count = (geometry.kernel_size[0] - 1) // 2
        if count < 2:
            raise ValueError(f"a deep stem stacks 3x3 kernels: kernel_size must be at least 5, got {kernel_size}")
        kinds = [factors] * count if isinstance(factors, str) else list(factors)
        if len(kinds) != count or any(kind not in FACTORS for kind in kinds):
            raise ValueError(f"factors must be {' or '.join(map(repr, FACTORS))}, or {count} of them, got {factors!r}")
        super().__init__(geometry, activation, device, dtype)
        inputs = [in_channels] + [out_channels] * (count - 1)
        common: dict[str, Any] = {"groups": groups, "bias": False, "device": device, "dtype": dtype}
        common |= {"padding": geometry.dilation, "dilation": geometry.dilation}
        self.factors = nn.ModuleList(
            OREPAConv2d(channels, out_channels, 3, scaling=scaling, **common)
            if kind == "orepa"
            else nn.Conv2d(channels, out_channels, 3, **common)
            for channels, kind in zip(inputs, kinds, strict=True)
        )
        self.factors[-1].stride = geometry.stride  # type: ignore[assignment]
        for factor in self.factors:
            if isinstance(factor, OREPAConv2d):
                factor.follows_autocast = False

    def composed_kernel(self) -> Tensor:
        """[Co, Ci/g, K, K], with a gradient to every factor."""
        factors: Any = self.factors
        return self._composed(
            [f.parameter_kernel() if isinstance(f, OREPAConv2d) else weight_in_forward(f) for f in factors]
        )

    def _wide_kernel(self) -> Tensor:
        factors: Any = self.factors
        return self._composed([wide_kernel(f) for f in factors])

    def _composed(self, factors: Sequence[Tensor]) -> Tensor:
        kernel = factors[0]
        for factor in factors[1:]:
            kernel, _ = compose_sequential((kernel, None), (factor, None), groups=self.groups)
        return kernel

    def _convolved(self, x: Tensor) -> Tensor:
        return self._conv(x, self.composed_kernel(), None)
