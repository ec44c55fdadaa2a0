"""QARepVGGBlock: RepVGG rearranged so that its weights and activations quantize well."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repkern.nn._pointwise import pointwise_map
from repkern.nn._weight_hooks import current_weight
from repkern.nn.branch_sum import Branch, branch_norm_sum
from repkern.nn.custom_l2 import norm_factor
from repkern.nn.fold import KernelBias, add_branches, fuse_bn, identity_kernel, pad_to
from repkern.nn.geometry import Pair, check_geometry
from repkern.nn.inner_norm import averaged, averaging_kernel, convolve
from repkern.nn.normed_sum import NormedSumBlock, plain_conv, solve_before_norm

__all__ = ["QARepVGGBlock"]


class QARepVGGBlock(NormedSumBlock):
    """activation(se(post_bn( BN(KxK) + 1x1 [+ x] [+ average of x] ))).

    [+ x] is there when Ci = Co, the stride is 1 and the size is kept.

    The block of QARepVGG (paper 2212.01593). Why INT8 likes it: in RepVGG each branch's
    BatchNorm has a scale gamma / sqrt(variance) of its own, and that of the identity branch, whose variance may be
    tiny in a channel, folds into a few huge weights per kernel, which one quantization step per tensor cannot serve.
    Here only the KxK branch has a norm, the other two add as they are, and the one norm after the sum gives the output
    a scale that training controls.

    Any odd K, stride, padding (None keeps the size at stride 1), dilation, groups and padding_mode. K = 1 has no 1x1
    branch besides `dense`. average: where x is added and K > 1, the mean of the K x K pixels under the kernel is added
    too; it has no parameters (YOLOv6's QARepVGGBlockV2). se: channels that a squeeze-excite reduces to; it follows the
    norm, so that the fused block computes the same (the released one puts it before the norm, and its conversion then
    changes the output).
    recompute: "cheap" makes the 1x1 map again in the backward instead of keeping it.
    Submodules: `dense`, `dense_bn`, `pointwise`, `identity` (nn.Identity), `post_bn`, `se`, `activation`; one that is
    absent is None. Input [N, Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
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
        recompute: str = "none",
        average: bool = False,
        se: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = check_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        super().__init__(geometry, activation, se, None, recompute, device, dtype)
        self.dense = plain_conv(geometry, device, dtype)
        self.dense_bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.pointwise: nn.Conv2d | None = None
        if self.kernel_size[0] > 1:
            self.pointwise = nn.Conv2d(
                in_channels, out_channels, 1, stride, groups=groups, bias=False, device=device, dtype=dtype
            )
        self.identity = nn.Identity() if self._keeps_positions else None
        self.average = average and self.identity is not None and self.kernel_size[0] > 1
        self.post_bn: nn.Module = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)

    @property
    def _adds_input(self) -> bool:
        return self.identity is not None

    def _branches(self) -> list[Branch]:
        branches = [Branch(self.dense_bn, self.dense)]
        if self.pointwise is not None:
            branches.append(Branch(None, self._pointwise_map, cheap=True))
        if self.average:
            branches.append(Branch(None, self._average_map, cheap=True))
        if self.identity is not None:
            branches.append(Branch(None))
        return branches

    def _pointwise_map(self, x: Tensor) -> Tensor:
        assert self.pointwise is not None
        return pointwise_map(self.pointwise, self._centre(x))

    def _average_map(self, x: Tensor) -> Tensor:
        kernel = averaging_kernel(self.out_channels, self.kernel_size[0], x)
        return convolve(self, x, kernel, None, self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Co, H', W']."""
        self._check_input(x)
        y = branch_norm_sum(x, self._branches(), recompute=self.recompute, owner=self)
        if self.se is None:
            return branch_norm_sum(y, [Branch(self.post_bn)], self.activation)
        return self._finish(self.post_bn(y))

    def _folded_others(self, like: Tensor) -> list[KernelBias]:
        folded: list[KernelBias] = []
        if self.pointwise is not None:
            folded.append((pad_to(current_weight(self.pointwise).to(like.dtype), self.kernel_size[0]), None))
        if self.average:
            diagonal = identity_kernel(self.in_channels, 1, self.groups, dtype=like.dtype, device=like.device)
            folded.append(averaged((diagonal, None), self.kernel_size[0]))
        if self.identity is not None:  # the last one, as custom_l2 knows
            folded.append((self._identity_kernel(like), None))
        return folded

    def _fold(self) -> KernelBias:
        weight, bias = fuse_bn(*self._folded_sum(), self.post_bn)
        return weight.to(self.kernel_dtype), bias.to(self.kernel_dtype)

    @torch.no_grad()
    def set_equivalent_kernel_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        """Solve for `dense` and the shift of `post_bn`; exact in eval mode. ValueError where a norm scales by 0."""
        self.set_kernel_before_norm(solve_before_norm(weight, bias, self.post_bn, [], "post_bn"), None)

    def adopt_norm(self, norm: nn.Module) -> bool:
        """Use the given BatchNorm, with its statistics, as `post_bn`."""
        self.post_bn = norm
        return True

    @torch.no_grad()
    def set_kernel_before_norm(self, weight: Tensor, bias: Tensor | None) -> None:
        """Solve for `dense` and the shift of `dense_bn`, so that the sum before `post_bn` is this convolution."""
        super().set_equivalent_kernel_bias(weight, bias)

    def custom_l2(self, *, include_identity: bool = True) -> Tensor:
        """The sum of squares of the equivalent kernel before `post_bn`, with the scale of `dense_bn` as a constant.

        The released block's term. It takes the place of the sum of squares of `custom_l2_parameters()`.
        """
        dense = current_weight(self.dense)
        factor = norm_factor(self.dense_bn, dense)
        others = self._folded_others(dense)
        if self.identity is not None and not include_identity:
            others = others[:-1]
        weight, _ = add_branches([(dense * factor, None), *others])
        return weight.square().sum()

    def custom_l2_parameters(self) -> list[nn.Parameter]:
        """The kernels whose weight decay `custom_l2` replaces."""
        return [p for conv in (self.dense, self.pointwise) if conv is not None for p in conv.parameters()]
