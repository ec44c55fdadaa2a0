"""MobileNet v1 (paper 1704.04861)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from repkern.models.network import Feature, Network, Options, Step, plan_strides, scaled

__all__ = ["DEFAULT_BLOCK", "MODELS", "MobileNetV1"]

DEFAULT_BLOCK = "conv_bn"

# Stages of equal reduction: (channels of each unit), the first unit of every stage but the first with stride 2.
MODELS = {"mobilenet_v1": ((64,), (128, 128), (256, 256), (512, 512, 512, 512, 512, 512), (1024, 1024))}
_STEM = 32


class _Unit(nn.Module):
    """A depthwise 3x3 and a 1x1, each with its ReLU."""

    depthwise: nn.Module
    pointwise: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Co, H', W']."""
        return self.pointwise(self.depthwise(x))


class MobileNetV1(Network):
    """`stem` (3x3, stride 2), `stages.N.i.{depthwise,pointwise}`, `head`.

    Feature maps: the five stages, at reductions 2, 4, 8, 16 and 32. Convolutions that are not part of a multi-branch
    block start as in He et al. 2015 (fan out), as torchvision's mobile networks do; the paper does not say.
    """

    def __init__(self, variant: tuple[tuple[int, ...], ...], options: Options) -> None:
        super().__init__(options)
        before = scaled(_STEM, options.width)
        first, *steps = plan_strides((2, 1, 2, 2, 2, 2), options.output_stride)
        self.stem = self._make(options.in_chans, before, 3, first.stride)
        self.stages, features = nn.ModuleList(), []
        for number, (widths, step) in enumerate(zip(variant, steps, strict=True)):
            units = []
            for at, published in enumerate(widths):
                channels = scaled(published, options.width)
                units.append(self._unit(before, channels, step if at == 0 else step.rest))
                before = channels
            self.stages.append(nn.Sequential(*units))
            features.append(Feature(before, step.reduction, f"stages.{number}"))
        self._finish(["stem", *(feature.module for feature in features)], features, before)
        self._init_he()

    def _unit(self, in_channels: int, out_channels: int, step: Step) -> _Unit:
        unit = _Unit()
        strided: dict[str, Any] = {"dilation": step.first_dilation, "identity": step.keeps_positions}
        unit.depthwise = self._make(in_channels, in_channels, 3, step.stride, groups=in_channels, **strided)
        unit.pointwise = self._make(in_channels, out_channels, 1)
        return unit
