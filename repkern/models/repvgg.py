"""RepVGG (paper 2101.03697): five stages of 3x3 blocks, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from repkern.models.network import Feature, Network, Options, Step, plan_strides, scaled

__all__ = ["DEFAULT_BLOCK", "MODELS", "RepVGG", "Variant"]

DEFAULT_BLOCK = "repvgg"


class Variant(NamedTuple):
    """One row of the paper's Tables 2 and 3.

    layers: blocks in stages 2 to 5. a, b: width of stages 1 to 4, and of stage 5. groups: of every second layer.
    se: what a squeeze-excite before the ReLU divides its channels by; post_se: the same for one after the ReLU.
    """

    layers: tuple[int, int, int, int]
    a: float
    b: float
    groups: int = 1
    se: int | None = None
    post_se: int | None = None


_A = (2, 4, 14, 1)
_B = (4, 6, 16, 1)
_D = (8, 14, 24, 1)

MODELS = {
    "repvgg_a0": Variant(_A, 0.75, 2.5),
    "repvgg_a1": Variant(_A, 1, 2.5),
    "repvgg_a2": Variant(_A, 1.5, 2.75),
    "repvgg_b0": Variant(_B, 1, 2.5),
    "repvgg_b1": Variant(_B, 2, 4),
    "repvgg_b1g2": Variant(_B, 2, 4, groups=2),
    "repvgg_b1g4": Variant(_B, 2, 4, groups=4),
    "repvgg_b2": Variant(_B, 2.5, 5),
    "repvgg_b2g2": Variant(_B, 2.5, 5, groups=2),
    "repvgg_b2g4": Variant(_B, 2.5, 5, groups=4),
    "repvgg_b3": Variant(_B, 3, 5),
    "repvgg_b3g2": Variant(_B, 3, 5, groups=2),
    "repvgg_b3g4": Variant(_B, 3, 5, groups=4),
    "repvgg_d2se": Variant(_D, 2.5, 5, se=16),
}

# Counted over the whole network from 0, the stem; the layer after these, the last one of B, is dense again.
_GROUPED_LAYERS = range(2, 27, 2)


class RepVGG(Network):
    """`stem`, `stages.N.i`, `head`: every layer a 3x3 block with a ReLU, the first of each stage with stride 2.

    Feature maps: stem (reduction 2) and the four stages (4, 8, 16, 32). Convolutions start as torch starts them, norms
    at 1, as in the released training.
    dilated_layers: with output_stride below 32, only that many last layers are dilated, the others of the dilated
    stages keep dilation 1; the paper's "fast" segmentation networks have 5 (Sec. 4.3). None: all of them.
    strides: of the stem and of the first layer of each stage (RepOptimizers, paper 2205.15242, Table 6).
    """

    def __init__(
        self,
        variant: Variant,
        options: Options,
        *,
        dilated_layers: int | None = None,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
    ) -> None:
        super().__init__(options)
        total = 1 + sum(variant.layers)
        if dilated_layers is not None and not 0 <= dilated_layers <= total:
            raise ValueError(f"dilated_layers must be 0 to {total}, got {dilated_layers!r}")
        if len(strides) != 5 or not all(isinstance(stride, int) and stride >= 1 for stride in strides):
            raise ValueError(f"strides must be five integers from 1, of the stem and four stages, got {strides!r}")
        self._variant = variant
        self._first_dilated = 0 if dilated_layers is None else total - dilated_layers
        widths = [min(64, 64 * variant.a), 64 * variant.a, 128 * variant.a, 256 * variant.a, 512 * variant.b]
        channels = [scaled(width, options.width) for width in widths]
        steps = plan_strides(strides, options.output_stride)
        features = [Feature(channels[0], steps[0].reduction, "stem")]
        self.stem = self._layer(0, options.in_chans, channels[0], steps[0])
        self.stages = nn.ModuleList()
        at = 1
        for number, (count, step) in enumerate(zip(variant.layers, steps[1:], strict=True)):
            before, after = channels[number : number + 2]
            layers = [self._layer(at, before, after, step)]
            layers += [self._layer(at + more, after, after, step.rest) for more in range(1, count)]
            self.stages.append(nn.Sequential(*layers))
            features.append(Feature(after, step.reduction, f"stages.{number}"))
            at += count
        self._finish([feature.module for feature in features], features, channels[-1])

    def _layer(self, at: int, in_channels: int, out_channels: int, step: Step) -> nn.Module:
        variant = self._variant
        return self._make(
            in_channels,
            out_channels,
            3,
            step.stride,
            dilation=step.first_dilation if at >= self._first_dilated else 1,
            groups=variant.groups if at in _GROUPED_LAYERS else 1,
            se=None if variant.se is None else max(1, out_channels // variant.se),
            post_se=None if variant.post_se is None else max(1, out_channels // variant.post_se),
            identity=step.keeps_positions,
        )
