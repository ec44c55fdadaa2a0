"""Multi-branch blocks as published code writes them: a module per convolution and norm, added up.

Parameters have the names they have in our blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repkern.nn import ConvNormAct, DiverseBranchBlock, RepBlock, RepVGGBlock
from repkern.nn._pointwise import pointwise_map
from repkern.nn._surgery import replace_modules

__all__ = ["plain_form"]


class PlainConvNormAct(nn.Module):
    """activation(bn(conv(x))) on the modules of `block`."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.activation = block.conv, block.bn, block.activation

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Co, H', W']."""
        y = self.bn(self.conv(x))
        return y if self.activation is None else self.activation(y)


class PlainRepVGG(nn.Module):
    """RepVGGBlock as in the released code of paper 2101.03697, on the modules of `block`."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        if block.se is not None or block.post_se is not None or block._margin != (0, 0):
            raise ValueError("the plain RepVGG block has no squeeze-excite, and a padding that keeps the size")
        self.dense, self.dense_bn = block.dense, block.dense_bn
        self.pointwise, self.pointwise_bn = block.pointwise, block.pointwise_bn
        self.identity_bn, self.activation = block.identity_bn, block.activation

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Co, H', W']."""
        y = self.dense_bn(self.dense(x)) + self.pointwise_bn(pointwise_map(self.pointwise, x))
        if self.identity_bn is not None:
            y = y + self.identity_bn(x)
        return y if self.activation is None else self.activation(y)


def _norm_and_pad(norm: Any, x: Tensor, padding: int) -> Tensor:
    """A BatchNorm, then a border of what it makes of zero by its running statistics: DBB's released BNAndPadLayer."""
    y = norm(x)
    if padding == 0:
        return y
    value = norm.bias.detach() - norm.running_mean * norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    y = functional.pad(y, [padding] * 4)
    value = value.view(1, -1, 1, 1)
    y[:, :, :padding] = value
    y[:, :, -padding:] = value
    y[:, :, :, :padding] = value
    y[:, :, :, -padding:] = value
    return y


class PlainDBB(nn.Module):
    """DiverseBranchBlock as in the released code of paper 2103.13425, on the modules of `block`."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        padding, k = block._pad[0], block.kernel_size[0]
        if block.avg is None or block.padding_mode != "zeros" or block.dilation != (1, 1) or block._margin != (0, 0):
            raise ValueError("the plain DBB is dense, undilated, and has a zero padding that keeps the size")
        self.dense, self.dense_bn = block.dense, block.dense_bn
        self.pointwise, self.pointwise_bn = block.pointwise, block.pointwise_bn
        self.padding = padding
        self.avg, self.avg_inner_bn, self.avg_bn = block.avg, block.avg_inner_bn, block.avg_bn
        self.pool = nn.AvgPool2d(k, block.stride)
        self.reduce, self.reduce_bn = block.reduce, block.reduce_bn
        self.expand, self.expand_bn = block.expand, block.expand_bn
        self.expand.padding = (0, 0)
        self.activation = block.activation

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Co, H', W']."""
        y = self.dense_bn(self.dense(x)) + self.pointwise_bn(pointwise_map(self.pointwise, x))
        y = y + self.avg_bn(self.pool(_norm_and_pad(self.avg_inner_bn, self.avg(x), self.padding)))
        y = y + self.expand_bn(self.expand(_norm_and_pad(self.reduce_bn, self.reduce(x), self.padding)))
        return y if self.activation is None else self.activation(y)


_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    ConvNormAct: PlainConvNormAct,
    RepVGGBlock: PlainRepVGG,
    DiverseBranchBlock: PlainDBB,
}


def plain_form(model: nn.Module) -> nn.Module:
    """`model` with every block in its published form, on the same parameters, in place. ValueError where none is."""

    def pick(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) in _FORMS:
            return _FORMS[type(module)](module)
        if isinstance(module, RepBlock):
            raise ValueError(f"`{name}`: there is no plain form of {type(module).__name__}")
        return None

    return replace_modules(model, pick)
