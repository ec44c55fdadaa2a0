"""The networks of the evidence table: small enough for runs of a minute, of any kind of block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn.kinds import make_block

__all__ = ["NETWORKS", "SixLayers", "SmallResNet", "make_network"]


class SixLayers(nn.Module):
    """Six 3x3 layers with ReLU, two of each width, of which the second and the fourth halve the map; a linear head.

    [N, channels, H, W] of any size -> logits [N, classes].
    """

    def __init__(
        self, block: str, channels: int, classes: int, widths: tuple[int, int, int] = (24, 48, 96), **options: Any
    ) -> None:
        super().__init__()
        first, second, third = widths
        plan = ((first, 1), (first, 2), (second, 1), (second, 2), (third, 1), (third, 1))
        layers, before = [], channels
        for width, stride in plan:
            layers.append(make_block(block, before, width, 3, stride, activation=nn.ReLU(), **options))
            before = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.layers(x), 1), 1))


class _Unit(nn.Module):
    """relu(conv2(conv1(x)) + shortcut(x)), both 3x3; the shortcut is conv + BN where the shape changes."""

    def __init__(self, block: str, before: int, width: int, stride: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.conv1 = make_block(block, before, width, 3, stride, activation=nn.ReLU(), **options)
        self.conv2 = make_block(block, width, width, 3, **options)
        same = before == width and stride == 1
        self.shortcut = nn.Identity() if same else make_block("conv_bn", before, width, 1, stride, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """[N, before, H, W] -> [N, width, H', W']."""
        return torch.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A 3x3 stem and one residual unit of two 3x3 layers for each width, of which the later ones halve the map.

    [N, channels, H, W] of any size -> logits [N, classes].
    """

    def __init__(
        self, block: str, channels: int, classes: int, widths: tuple[int, ...] = (16, 32, 64), **options: Any
    ) -> None:
        super().__init__()
        self.stem = make_block(block, channels, widths[0], 3, activation=nn.ReLU(), **options)
        units, before = [], widths[0]
        for index, width in enumerate(widths):
            units.append(_Unit(block, before, width, 1 if index == 0 else 2, options))
            before = width
        self.units = nn.Sequential(*units)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.units(self.stem(x)), 1), 1))


NETWORKS: dict[str, Callable[..., nn.Module]] = {"six layers": SixLayers, "small resnet": SmallResNet}


def make_network(name: str, block: str, channels: int, classes: int, **options: Any) -> nn.Module:
    """A network of NETWORKS with fresh values. options: of the block class. ValueError for another name."""
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")
    return NETWORKS[name](block, channels, classes, **options)
