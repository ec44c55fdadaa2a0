"""OREPARepVGGBlock: RepVGG's three normed branches, the KxK one squeezed from OREPA's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn.block import RepBlock
from repkern.nn.branch_sum import Branch, branch_norm_sum
from repkern.nn.fold import KernelBias, add_branches, fuse_bn, identity_kernel, pad_to
from repkern.nn.geometry import Pair, check_geometry
from repkern.nn.orepa import OREPAConv2d

__all__ = ["OREPARepVGGBlock"]

# The 1x1 branch has a norm of its own here, so it is not part of the squeezed kernel (paper 2204.00826, Sec. 4.3).
_SQUEEZED = ("origin", "avg", "prior", "1x1-KxK", "dw-pw")


class OREPARepVGGBlock(RepBlock):
    """activation( BN(squeezed KxK) + BN(1x1) [+ BN(x) when Ci = Co, stride 1 and the size is kept] ).

    The OREPA-VGG block of paper 2204.00826, Sec. 4.3, for any odd K >= 3, groups (depthwise included), dilation and
    padding. Submodules: `dense` (OREPAConv2d without its 1x1 branch), `dense_bn`, `pointwise`, `pointwise_bn` and
    `identity_bn` (None when absent). padding: None keeps the size at stride 1.
    Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        if geometry.kernel_size[0] == 1:
            raise ValueError("kernel_size must be at least 3 (1x1 is a branch of its own), got 1; use OREPABlock")
        super().__init__(geometry, activation)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dense = OREPAConv2d(
            *geometry[:7],
            bias=False,
            padding_mode=padding_mode,
            scaling=scaling,
            internal_channels=internal_channels,
            expansion=expansion,
            branches=_SQUEEZED,
            **factory,
        )
        self.dense_bn = nn.BatchNorm2d(out_channels, **factory)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, self.stride, groups=groups, bias=False, **factory)
        self.pointwise_bn = nn.BatchNorm2d(out_channels, **factory)
        self.identity_bn = nn.BatchNorm2d(out_channels, **factory) if self._keeps_positions else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Co, H', W']."""
        branches = [Branch(self.dense_bn, self.dense), Branch(self.pointwise_bn, self._pointwise_map, cheap=True)]
        if self.identity_bn is not None:
            branches.append(Branch(self.identity_bn))
        return branch_norm_sum(x, branches, self.activation)

    def _pointwise_map(self, x: Tensor) -> Tensor:
        return self.pointwise(self._centre(x))

    def _fold(self) -> KernelBias:
        return add_branches([self._folded_dense(), *self._folded_others()])

    def _folded_dense(self) -> KernelBias:
        return fuse_bn(self.dense._fold()[0], None, self.dense_bn)

    def _folded_others(self) -> list[KernelBias]:
        k = self.kernel_size[0]
        folded = [fuse_bn(pad_to(self.pointwise.weight, k), None, self.pointwise_bn)]
        if self.identity_bn is not None:
            weight = self.pointwise.weight
            identity = identity_kernel(self.in_channels, k, self.groups, dtype=weight.dtype, device=weight.device)
            folded.append(fuse_bn(identity, None, self.identity_bn))
        return list(folded)

    @torch.no_grad()
    def set_equivalent_kernel_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        """Solve for the squeezed branch's origin and its norm's shift; exact in eval mode."""
        other_weight, other_bias = add_branches(self._folded_others())
        assert other_bias is not None
        norm = self.dense_bn
        assert norm.running_mean is not None
        factor, shift = fuse_bn(torch.ones_like(norm.running_mean), None, norm)
        if not factor.all():
            raise ValueError("`dense_bn` scales a channel by 0, so no kernel before it gives the wanted one")
        left = (weight.double() - other_weight.double()) / factor.double()[:, None, None, None]
        self.dense.set_equivalent_kernel_bias(left, None)
        wanted = -other_bias if bias is None else bias - other_bias
        norm.bias.add_(wanted - shift)
