"""TrivialRepConv2d: a convolution whose kernel is its parameter plus an identity."""

from __future__ import annotations

from torch import Tensor

from repkern.nn.dirac import IdentityKernelConv2d

__all__ = ["TrivialRepConv2d"]


class TrivialRepConv2d(IdentityKernelConv2d):
    """nn.Conv2d with the kernel I + W: the "trivial re-param" baseline of RepVGG (paper 2101.03697, Table 7).

    kernel_size: any odd K. Parameters: weight [Co, Ci/g, K, K], bias [Co].
    Input [N, Ci, H, W] or [Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    def kernel(self) -> Tensor:
        """[Co, Ci/g, K, K], with a gradient to every parameter but the bias."""
        return self.weight + self.identity

    def _solve(self, weight: Tensor) -> None:
        self.weight.copy_(weight - self.identity)
