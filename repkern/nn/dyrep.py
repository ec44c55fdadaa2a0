"""DyRepBlock: seven branches that come and go during training without changing the function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn._weight_hooks import current_bias, current_weight
from repkern.nn.fold import fuse_bn
from repkern.nn.geometry import Pair, check_geometry
from repkern.nn.seven_branches import SevenBranchBlock

__all__ = ["DyRepBlock"]


class DyRepBlock(SevenBranchBlock):
    """activation(sum of branches), each with norms: the block of DyRep (paper 2203.12868, Table 1).

    branches: any of ("1x1", "1x1_kxk", "1x1_avg", "kxk", "1xk", "kx1", "id") with "kxk"; None: all that are possible
    ("id" where Ci = Co, stride 1 and the size is kept; for K = 1 only "1x1_kxk", "kxk" and "id"). Any odd K, stride,
    padding (None keeps the size at stride 1), dilation, groups, padding_mode; depthwise (groups = Ci = Co), the average
    is that of the input.
    internal_channels: Cm of the 1x1-KxK branch; default Ci. border: as in DiverseBranchBlock. recompute: "cheap" makes
    the 1x1 and averaged maps again in the backward instead of keeping them.
    Submodules (None when absent): `dense` (KxK, with bias), `dense_bn`, `pointwise`, `pointwise_bn`, `reduce`,
    `reduce_bn`, `expand`, `expand_bn`, `avg` (its 1x1), `avg_inner_bn`, `avg_bn`, `horizontal` (1xK), `horizontal_bn`,
    `vertical` (Kx1), `vertical_bn`, `identity_bn`. `dense` and `expand` may be DyRepBlocks themselves (`expand` reads a
    padded map, so its own padding is 0).
    Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    _dense_bias = True

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
        recompute: str = "none",
        branches: Sequence[str] | None = None,
        internal_channels: int | None = None,
        border: str = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        branches = None if branches is None else tuple(branches)
        if branches is not None and "kxk" not in branches:
            raise ValueError(f"branches must have 'kxk', which takes what others leave, got {tuple(branches)}")
        super().__init__(geometry, activation, recompute, branches, internal_channels, border, device, dtype)

    @classmethod
    def grow(cls, conv: nn.Conv2d, *, last_scale: float = 0.01, **options: Any) -> DyRepBlock:
        """A block that computes what `conv` computes in eval mode (Eq. 6), its other branches drawn at random.

        last_scale: of the new branches' last norms, small so that `dense` stays near the convolution's kernel.
        options: those of the block, such as `branches`. The convolution inside a block may be grown as well:
        `block.dense = DyRepBlock.grow(block.dense)`.
        """
        block = cls.from_conv(conv, **options)
        assert isinstance(block, DyRepBlock)
        block.train(conv.training).requires_grad_(conv.weight.requires_grad)
        block._draw([name for name in block.branches if name != "kxk"], last_scale)
        block.set_equivalent_kernel_bias(current_weight(conv), current_bias(conv))
        return block

    @torch.no_grad()
    def add_branches(self, names: Sequence[str], *, last_scale: float = 0.01) -> None:
        """Add branches, drawn at random, and take them out of `dense`, so that the eval function stays (Eq. 6).

        To let the new norms see data first: keep `equivalent_kernel_bias()`, add, run batches through, and give it to
        `set_equivalent_kernel_bias`. ValueError for branches that are there already or impossible.
        """
        present = [name for name in names if name in self.branches]
        if present:
            raise ValueError(f"the block has the branch {', '.join(present)} already")
        target = self._target()
        parameter = next(self.parameters())
        self._add(names, {"device": parameter.device, "dtype": parameter.dtype})
        self._draw(names, last_scale)
        self._keep(*target)

    @torch.no_grad()
    def remove_branches(self, names: Sequence[str]) -> None:
        """Cut branches and give their kernels to `dense`, so that the eval function stays (Eq. 10).

        Nested blocks and the branches that stay are untouched. ValueError for "kxk" and for branches not there.
        """
        if "kxk" in names:
            raise ValueError("the branch 'kxk' takes what the others leave and cannot be removed; use fuse()")
        target = self._target()
        shifts = [getattr(self.last_norm(name), "bias", None) for name in names]
        self._remove(names)
        own = self.last_norm("kxk").bias
        if isinstance(own, Tensor):
            for shift in shifts:
                if shift is not None:
                    own.add_(shift)
        self._keep(*target)

    def _draw(self, names: Sequence[str], last_scale: float) -> None:
        for name in names:
            for module in self._modules_of(name):
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out")
            norm: Any = self.last_norm(name)
            nn.init.constant_(norm.weight, last_scale)

    def _target(self) -> tuple[Tensor, Tensor]:
        """The equivalent convolution in float64. ValueError where `dense` could not be solved for afterwards."""
        norm: Any = self.dense_bn
        if norm.weight is not None and not norm.weight.all():
            raise ValueError("`dense_bn` scales a channel by 0, so no kernel before it gives the wanted one")
        weight, bias = self._fold_in(next(self.parameters()).double())
        assert bias is not None
        return weight, bias

    def _keep(self, weight: Tensor, bias: Tensor) -> None:
        """Make this the equivalent convolution, moving the mean that `dense_bn` expects and not its shift.

        The shifts of the last norms then go on adding up to the mean of the output, which is what training keeps.
        """
        norm: Any = self.dense_bn
        before = None if norm.bias is None else norm.bias.clone()
        self.set_equivalent_kernel_bias(weight, bias)
        if before is not None:
            factor, _ = fuse_bn(torch.ones_like(norm.running_mean, dtype=torch.float64), None, norm)
            norm.running_mean.sub_((norm.bias.double() - before.double()) / factor)
            norm.bias.copy_(before)
