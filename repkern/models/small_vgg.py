"""The small VGG-style network of `repkern repopt`: 3x3 blocks of one kind and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn.kinds import check_kind, make_block

__all__ = ["SmallVGG"]


class SmallVGG(nn.Module):
    """A stem and one stage per entry of `widths`, each of `blocks` 3x3 layers with ReLU; a linear head.

    Each stage after the first begins with stride 2, as in RepVGG (paper 2101.03697), which starts with stride 2 too
    and needs larger images for it. block: one of `repkern.nn.KINDS`; the reparameterized state_dict of each loads into
    "plain". block_options: arguments of the block class, such as {"scaling": "scalar"} for OREPA.
    Images [N, in_chans, H, W] of any size -> logits [N, num_classes].
    ValueError for empty or non-positive sizes and unknown kinds, TypeError for options the kind does not have.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64),
        blocks: int = 4,
        num_classes: int = 10,
        in_chans: int = 1,
        block: str = "conv_bn",
        block_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not widths or min(*widths, blocks, num_classes, in_chans) < 1:
            raise ValueError(
                "SmallVGG: sizes must be positive, got "
                f"widths={widths}, blocks={blocks}, num_classes={num_classes}, in_chans={in_chans}"
            )
        chosen = dict(block_options or {})
        check_kind(block, chosen)

        def layer(before: int, after: int, stride: int) -> nn.Module:
            return make_block(block, before, after, 3, stride, activation=nn.ReLU(), **chosen)

        self.stem = layer(in_chans, widths[0], 1)
        self.stages = nn.ModuleList()
        before = widths[0]
        for index, width in enumerate(widths):
            first = layer(before, width, 1 if index == 0 else 2)
            self.stages.append(nn.Sequential(first, *(layer(width, width, 1) for _ in range(blocks - 1))))
            before = width
        self.head = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> logits [N, num_classes]."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))
