"""ResNet (He et al. 2016), ResNeXt (Xie et al. 2017) and wide ResNet-18, with any block for their convolutions."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from repkern.models.network import Feature, Network, Options, Step, plan_strides, scaled

__all__ = ["DEFAULT_BLOCK", "MODELS", "ResNet", "Variant"]

DEFAULT_BLOCK = "conv_bn"


class Variant(NamedTuple):
    """layers: units per stage. groups, group_width: of the 3x3 in a bottleneck. width: of the whole network."""

    layers: tuple[int, int, int, int]
    bottleneck: bool
    groups: int = 1
    group_width: int = 64
    width: float = 1.0


MODELS = {
    "resnet18": Variant((2, 2, 2, 2), False),
    "resnet34": Variant((3, 4, 6, 3), False),
    "resnet50": Variant((3, 4, 6, 3), True),
    "resnet101": Variant((3, 4, 23, 3), True),
    "resnext50_32x4d": Variant((3, 4, 6, 3), True, groups=32, group_width=4),
    "wide_resnet18_1_5": Variant((2, 2, 2, 2), False, width=1.5),
    "wide_resnet18_2": Variant((2, 2, 2, 2), False, width=2.0),
}

_WIDTHS = (64, 128, 256, 512)
_EXPANSION = 4


class _Unit(nn.Module):
    """relu(layers(x) + shortcut(x)); layers are conv1, conv2 and, in a bottleneck, conv3."""

    conv1: nn.Module
    conv2: nn.Module
    conv3: nn.Module | None
    shortcut: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Co, H', W']."""
        y = self.conv2(self.conv1(x))
        if self.conv3 is not None:
            y = self.conv3(y)
        return self.relu(y + self.shortcut(x))


class ResNet(Network):
    """`stem` (7x7, stride 2), `pool`, `stages.N.i.{conv1,conv2,conv3,shortcut}`, `head`.

    The stride of a bottleneck is in its 3x3 (torchvision, DBB and OREPA have it there; He et al. in the first 1x1).
    Shortcuts of basic units are always conv + BN, those of bottlenecks are blocks, as in the released OREPA networks.
    Feature maps: stem (reduction 2) and the four stages (4, 8, 16, 32). Convolutions that are not part of a
    multi-branch block start as in He et al. 2015 (fan out), as in torchvision.
    """

    def __init__(self, variant: Variant, options: Options) -> None:
        super().__init__(options)
        self._variant = variant
        width = variant.width * options.width
        widths = [scaled(64 * variant.width, options.width)]
        widths += [scaled(channels * variant.width, options.width) for channels in _WIDTHS]
        expansion = _EXPANSION if variant.bottleneck else 1
        steps = plan_strides((1, 2, 2, 2), options.output_stride, reduction=4)
        features = [Feature(widths[0], 2, "stem")]
        self.stem = self._make(options.in_chans, widths[0], 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList()
        before = widths[0]
        for number, (channels, step) in enumerate(zip(widths[1:], steps, strict=True)):
            inner = self._inner(_WIDTHS[number], width, channels)
            self.stages.append(self._stage(before, channels * expansion, inner, variant.layers[number], step))
            before = channels * expansion
            features.append(Feature(before, step.reduction, f"stages.{number}"))
        self._finish(["stem", "pool", *(feature.module for feature in features[1:])], features, before)
        self._init_he()

    def _inner(self, nominal: int, width: float, channels: int) -> int:
        """Channels between the layers of a unit."""
        variant = self._variant
        if variant.groups == 1:
            return channels
        return variant.groups * max(1, int(nominal * width * variant.group_width / 64))

    def _stage(self, in_channels: int, out_channels: int, inner: int, count: int, step: Step) -> nn.Sequential:
        units = [self._unit(in_channels, inner, out_channels, step)]
        units += [self._unit(out_channels, inner, out_channels, step.rest) for _ in range(1, count)]
        return nn.Sequential(*units)

    def _unit(self, in_channels: int, inner: int, out_channels: int, step: Step) -> _Unit:
        unit = _Unit()
        strided: dict[str, Any] = {
            "stride": step.stride,
            "dilation": step.first_dilation,
            "identity": step.keeps_positions,
        }
        if self._variant.bottleneck:
            unit.conv1 = self._make(in_channels, inner, 1)
            unit.conv2 = self._make(inner, inner, 3, groups=self._variant.groups, **strided)
            unit.conv3 = self._make(inner, out_channels, 1, relu=False)
        else:
            unit.conv1 = self._make(in_channels, inner, 3, **strided)
            unit.conv2 = self._make(inner, out_channels, 3, dilation=step.dilation, relu=False)
            unit.conv3 = None
        unit.shortcut = nn.Identity()
        if in_channels != out_channels or not step.keeps_positions:
            kind = None if self._variant.bottleneck else "conv_bn"
            unit.shortcut = self._make(in_channels, out_channels, 1, step.stride, kind=kind, relu=False)
        return unit
