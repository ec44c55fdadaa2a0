"""TrivialRepConv2d: a convolution whose kernel is its parameter plus an identity."""

from __future__ import annotations

from torch import Tensor

from repkern.nn.branch_weight import tensor_of, write_weight
from repkern.nn.dirac import IdentityKernelConv2d

__all__ = ["TrivialRepConv2d"]


class TrivialRepConv2d(IdentityKernelConv2d):
    """nn.Conv2d with the kernel I + W: the "trivial re-param" baseline of RepVGG (paper 2101.03697, Table 7).

    kernel_size: any odd K. Parameters: deviation.weight [Co, Ci/g, K, K] (W), bias [Co]; `weight` is the kernel.
    Input [N, Ci, H, W] or [Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    def kernel(self) -> Tensor:
        """[Co, Ci/g, K, K], with a gradient to every parameter but the bias."""
        kernel: Tensor = tensor_of(self.deviation) + self.identity
        return kernel

    def _solve(self, weight: Tensor) -> None:
        write_weight(self.deviation, weight - self.identity)
