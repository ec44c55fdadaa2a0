"""ACBlock: a KxK, a Kx1 and a 1xK branch, each with a norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn._weight_hooks import current_weight
from repkern.nn.branch_sum import Branch
from repkern.nn.fold import KernelBias, fuse_bn
from repkern.nn.geometry import Pair, check_geometry
from repkern.nn.line import line_conv, pad_line, stripped
from repkern.nn.normed_sum import NormedSumBlock, plain_conv

__all__ = ["ACBlock"]

_LARGEST_GAMMA = 1e4  # what half precision holds; not a number is refused too


class ACBlock(NormedSumBlock):
    """activation( BN(KxK) + BN(Kx1) + BN(1xK) ).

    The asymmetric block of ACNet (paper 1908.03930, Sec. 3.3), for any odd K, stride, padding (None keeps the size at
    stride 1), dilation (fails in the released code), groups and padding_mode. The 1-D kernels lie on the middle row and
    column of the square one; where padding is smaller than dilation * (K // 2), they skip the input's border, which the
    middle does not reach. K = 1 has only `dense`.

    use_affine: whether the norms have weight and bias. reduce_gamma: their weights start at 1 over the number of
    branches; gamma_init: at this value; otherwise at 1. ValueError for both, or for either without `use_affine`.
    recompute: "cheap" makes the maps of the 1-D kernels again in the backward instead of keeping them.
    Submodules: `dense`, `dense_bn`, `vertical` (Kx1), `vertical_bn`, `horizontal` (1xK), `horizontal_bn`; None when
    absent. Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    identity_bn = None

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
        recompute: str = "none",
        use_affine: bool = True,
        reduce_gamma: bool = False,
        gamma_init: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        if reduce_gamma and gamma_init is not None:
            raise ValueError(f"reduce_gamma=True and gamma_init={gamma_init} both set the norms' weights; give one")
        if gamma_init is not None and not (isinstance(gamma_init, float | int) and abs(gamma_init) <= _LARGEST_GAMMA):
            raise ValueError(f"gamma_init must be a number of at most {_LARGEST_GAMMA:g}, got {gamma_init!r}")
        if not use_affine and (reduce_gamma or gamma_init is not None):
            raise ValueError("reduce_gamma and gamma_init need use_affine=True: the norms have no weights without it")
        super().__init__(geometry, activation, None, None, recompute, device, dtype)
        norm: dict[str, Any] = {"affine": use_affine, "device": device, "dtype": dtype}
        self.dense = plain_conv(geometry, device, dtype)
        self.dense_bn = nn.BatchNorm2d(out_channels, **norm)
        self.vertical = self.horizontal = None
        self.vertical_bn = self.horizontal_bn = None
        if self.kernel_size[0] > 1:
            factory: dict[str, Any] = {"device": device, "dtype": dtype}
            self.vertical, self.vertical_bn = line_conv(self, 1, factory), nn.BatchNorm2d(out_channels, **norm)
            self.horizontal, self.horizontal_bn = line_conv(self, 0, factory), nn.BatchNorm2d(out_channels, **norm)
        norms = [module for module in self.children() if isinstance(module, nn.BatchNorm2d)]
        if reduce_gamma:
            gamma_init = 1 / len(norms)
        if gamma_init is not None:
            for module in norms:
                nn.init.constant_(module.weight, gamma_init)

    def _vertical_map(self, x: Tensor) -> Tensor:
        assert self.vertical is not None
        return self.vertical(stripped(self, x, 1))

    def _horizontal_map(self, x: Tensor) -> Tensor:
        assert self.horizontal is not None
        return self.horizontal(stripped(self, x, 0))

    def _branches(self) -> list[Branch]:
        branches = [Branch(self.dense_bn, self.dense)]
        if self.vertical is not None:
            branches.append(Branch(self.vertical_bn, self._vertical_map, cheap=True))
        if self.horizontal is not None:
            branches.append(Branch(self.horizontal_bn, self._horizontal_map, cheap=True))
        return branches

    def _folded_others(self, like: Tensor) -> list[KernelBias]:
        folded: list[KernelBias] = []
        for line, norm, across in ((self.vertical, self.vertical_bn, 1), (self.horizontal, self.horizontal_bn, 0)):
            if line is not None and norm is not None:
                folded.append(fuse_bn(pad_line(current_weight(line).to(like.dtype), across), None, norm))
        return folded
