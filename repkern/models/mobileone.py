"""MobileOne (paper 2206.04040): depthwise and pointwise layers, each a block of several branches."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from repkern.models.network import Feature, Network, Options, Step, plan_strides, scaled

__all__ = ["DEFAULT_BLOCK", "MODELS", "MobileOne", "Variant"]

DEFAULT_BLOCK = "mobileone"


class Variant(NamedTuple):
    """One column of the paper's Table 2. branches: KxK ones of a block; se: squeeze-excite in the last units."""

    widths: tuple[float, float, float, float]
    branches: int = 1
    se: bool = False


MODELS = {
    "mobileone_s0": Variant((0.75, 1.0, 1.0, 2.0), branches=4),
    "mobileone_s1": Variant((1.5, 1.5, 2.0, 2.5)),
    "mobileone_s2": Variant((1.5, 2.0, 2.5, 4.0)),
    "mobileone_s3": Variant((2.0, 2.5, 3.0, 4.0)),
    "mobileone_s4": Variant((3.0, 3.5, 3.5, 4.0), se=True),
}

_CHANNELS = (64, 128, 256, 512)
_UNITS = (2, 8, 10, 1)
_UNITS_WITH_SE = (0, 0, 5, 1)
_REDUCTION = 16


class MobileOne(Network):
    """`stem` (3x3, stride 2), `stages.N.i` (a depthwise 3x3 block at every even i, a 1x1 block behind it), `head`.

    The stem has one KxK branch in all variants, as released.
    Feature maps: stem (reduction 2) and the four stages (4, 8, 16, 32). Convolutions start as torch starts them, as in
    the released training.
    """

    def __init__(self, variant: Variant, options: Options) -> None:
        super().__init__(options)
        first, *steps = plan_strides((2, 2, 2, 2, 2), options.output_stride)
        before = scaled(min(64, 64 * variant.widths[0]), options.width)
        features = [Feature(before, first.reduction, "stem")]
        self.stem = self._make(options.in_chans, before, 3, first.stride)
        if self.block == "mobileone":
            self._block_options.setdefault("num_conv_branches", variant.branches)
        self.stages = nn.ModuleList()
        for number, step in enumerate(steps):
            channels = scaled(_CHANNELS[number] * variant.widths[number], options.width)
            layers: list[nn.Module] = []
            for at in range(_UNITS[number]):
                excited = variant.se and at >= _UNITS[number] - _UNITS_WITH_SE[number]
                layers += self._unit(before, channels, step if at == 0 else step.rest, excited)
                before = channels
            self.stages.append(nn.Sequential(*layers))
            features.append(Feature(channels, step.reduction, f"stages.{number}"))
        self._finish([feature.module for feature in features], features, before)

    def _unit(self, in_channels: int, out_channels: int, step: Step, excited: bool) -> list[nn.Module]:
        depthwise = self._make(
            in_channels,
            in_channels,
            3,
            step.stride,
            dilation=step.first_dilation,
            groups=in_channels,
            identity=step.keeps_positions,
            se=max(1, in_channels // _REDUCTION) if excited else None,
        )
        reduced = max(1, out_channels // _REDUCTION) if excited else None
        return [depthwise, self._make(in_channels, out_channels, 1, se=reduced)]
