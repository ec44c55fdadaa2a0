"""The 1xK and Kx1 convolutions on the middle row and column of a KxK kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from repkern.nn.block import RepBlock

__all__ = ["line_conv", "pad_line", "stripped"]


def line_conv(block: RepBlock, across: int, factory: dict[str, Any]) -> nn.Conv2d:
    """The convolution of extent 1 along axis `across` (0: rows, so 1xK), to be given `stripped(block, x, across)`."""
    kernel, padding = list(block.kernel_size), list(block._pad)
    kernel[across] = 1
    padding[across] = max(block._margin[across], 0)
    return nn.Conv2d(
        block.in_channels,
        block.out_channels,
        (kernel[0], kernel[1]),
        block.stride,
        (padding[0], padding[1]) if block.padding_mode == "zeros" else 0,
        block.dilation,
        block.groups,
        bias=False,
        **factory,
    )


def stripped(block: RepBlock, x: Tensor, across: int) -> Tensor:
    """x without the border along axis `across` that the kernel's middle does not reach; padded unless by zeros."""
    if block.padding_mode == "zeros":
        strip = max(-block._margin[across], 0)
    else:
        x, strip = block._padded(x), block.dilation[across] * (block.kernel_size[across] // 2)
    if strip == 0:
        return x
    return functional.pad(x, (0, 0, -strip, -strip) if across == 0 else (-strip, -strip))


def pad_line(weight: Tensor, across: int) -> Tensor:
    """[Co, Ci/g, 1, K] (across 0) or [Co, Ci/g, K, 1] (across 1) -> [Co, Ci/g, K, K], zero off the middle."""
    half = weight.shape[3 - across] // 2
    return functional.pad(weight, (0, 0, half, half) if across == 0 else (half, half))
