"""1x1 convolutions with a stride, around a crash in torch's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from repkern.nn._norm_state import untouched

__all__ = ["pointwise_map"]

# oneDNN's weight gradient of a strided 1x1 convolution of few channels_last channels writes past its buffer: a
# segmentation fault at [16, 3, 128, 128], stride 2, in torch 2.13. Found with 2 to 15 channels, not with 1, 16 or
# groups.
_FEW_CHANNELS = 16


def pointwise_map(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x) for a 1x1 convolution without padding; where torch could crash, on the pixels that it reads."""
    crashes = type(conv) is nn.Conv2d and conv.stride != (1, 1) and conv.in_channels < _FEW_CHANNELS
    if not crashes or not isinstance(x, Tensor) or x.device.type != "cpu" or not untouched(conv):
        return conv(x)
    own: Any = conv
    height, width = own.stride
    return functional.conv2d(x[..., ::height, ::width], own.weight, own.bias, groups=own.groups)
