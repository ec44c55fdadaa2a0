"""PSPNet (Zhao et al. 2017): pyramid pooling over a backbone, for semantic segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repkern.models.network import Network
from repkern.models.registry import create_model
from repkern.nn.kinds import make_block

__all__ = ["FAST_LAYERS", "PSPNet", "PyramidPooling"]

#: The dilated layers of the paper's fast variants: the last four of stage 4 and the one of stage 5.
FAST_LAYERS = 5
_BACKBONE = {"features_only": True, "out_indices": (-2, -1), "output_stride": 8}


class PyramidPooling(nn.Module):
    """The map and, resized to it, its averages over b x b regions for every b of `bins`, as channels.

    [N, C, H, W] -> [N, C + len(bins) * (C // len(bins)), H, W]; each average goes through `levels.N`, a 1x1 block.
    """

    def __init__(self, channels: int, bins: Sequence[int] = (1, 2, 3, 6), *, kind: str = "conv_bn") -> None:
        super().__init__()
        if not bins or min(bins) < 1:
            raise ValueError(f"bins must be positive, got {list(bins)}")
        self.bins = tuple(bins)
        reduced = channels // len(bins)
        self.levels = nn.ModuleList(make_block(kind, channels, reduced, 1, activation=nn.ReLU()) for _ in self.bins)
        self.out_channels = channels + reduced * len(self.bins)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out_channels, H, W]."""
        maps = [x]
        for size, level in zip(self.bins, self.levels, strict=True):
            pooled = level(functional.adaptive_avg_pool2d(x, size))
            maps.append(functional.interpolate(pooled, x.shape[-2:], mode="bilinear", align_corners=True))
        return torch.cat(maps, 1)


class PSPNet(nn.Module):
    """Class scores for every pixel: images [N, in_chans, H, W] -> [N, num_classes, H, W].

    backbone: a features_only network; the pyramid sits on its last feature map. auxiliary: where the backbone returns
    two maps, scores from the first of them too, and in train mode the output is (scores, auxiliary scores); the paper
    adds their losses with weight 0.4. Submodules: `backbone`, `pyramid`, `mix`, `classifier`, `auxiliary_mix`,
    `auxiliary_classifier`. The layers of the head are conv + BN ("plain" with a plain backbone), so `reparameterize`
    converts all of it. At least 2 images in train mode: the 1x1 region has one value per image and channel.
    ValueError for a backbone with a head.
    """

    def __init__(
        self,
        backbone: Network,
        num_classes: int = 19,
        *,
        bins: Sequence[int] = (1, 2, 3, 6),
        hidden: int = 512,
        auxiliary_hidden: int = 256,
        dropout: float = 0.1,
        auxiliary: bool = True,
    ) -> None:
        super().__init__()
        if not backbone.options.features_only:
            raise ValueError(f"the backbone {backbone.model_name} must be made with features_only=True")
        if auxiliary and len(backbone.feature_info) < 2:
            raise ValueError("auxiliary=True needs a backbone with two feature maps, such as out_indices=(-2, -1)")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        kind = "plain" if backbone.block == "plain" else "conv_bn"
        self.backbone = backbone
        self.pyramid = PyramidPooling(backbone.feature_info[-1].channels, bins, kind=kind)
        self.mix = make_block(kind, self.pyramid.out_channels, hidden, 3, activation=nn.ReLU())
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(hidden, num_classes, 1)
        self.auxiliary_mix: nn.Module | None = None
        self.auxiliary_classifier: nn.Module | None = None
        if auxiliary:
            channels = backbone.feature_info[0].channels
            self.auxiliary_mix = make_block(kind, channels, auxiliary_hidden, 3, activation=nn.ReLU())
            self.auxiliary_classifier = nn.Conv2d(auxiliary_hidden, num_classes, 1)

    @classmethod
    def from_name(
        cls, name: str, num_classes: int = 19, *, fast: bool = False, auxiliary: bool = True, **backbone: Any
    ) -> PSPNet:
        """PSPNet over `create_model(name)` at output stride 8; `backbone`: further arguments of create_model.

        fast: the variants of the RepVGG paper (Table 8) whose last five layers only are dilated. ValueError for fast
        with another family than RepVGG.
        """
        options = {**_BACKBONE, **backbone}
        if fast:
            options["dilated_layers"] = FAST_LAYERS
        try:
            network = create_model(name, **options)
        except TypeError as problem:
            if fast and "dilated_layers" in str(problem):
                raise ValueError(f"fast=True is defined for RepVGG networks, got {name!r}") from None
            raise
        return cls(network, num_classes, auxiliary=auxiliary)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[N, in_chans, H, W] -> scores [N, num_classes, H, W]; in train mode with their auxiliary pair."""
        maps = self.backbone(x)
        scores = self.classifier(self.dropout(self.mix(self.pyramid(maps[-1]))))
        scores = _resized(scores, x)
        if self.auxiliary_mix is None or self.auxiliary_classifier is None or not self.training:
            return scores
        auxiliary = self.auxiliary_classifier(self.dropout(self.auxiliary_mix(maps[0])))
        return scores, _resized(auxiliary, x)


def _resized(scores: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(scores, like.shape[-2:], mode="bilinear", align_corners=True)
