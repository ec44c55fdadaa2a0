"""The ResNet-18 of `repkern.models` in plain torch modules: what the training benchmark swaps blocks into."""

from __future__ import annotations

from torch import nn

from repkern.models import create_model
from repkern.nn._surgery import replace_modules
from repkern.nn.conv_norm_act import ConvNormAct

__all__ = ["ResNet18"]


def ResNet18(num_classes: int = 1000) -> nn.Module:
    """[N, 3, H, W] -> [N, num_classes]; every convolution is an nn.Conv2d with an nn.BatchNorm2d behind it."""
    return replace_modules(create_model("resnet18", num_classes=num_classes), _in_plain_torch)


def _in_plain_torch(name: str, module: nn.Module) -> nn.Module | None:
    if not isinstance(module, ConvNormAct):
        return None
    layers = [module.conv, module.bn]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if module.activation is not None else nn.Sequential(*layers)
