"""Random crops of padded images."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from repkern.data.augment._sampling import UniformDraws, check_images, draw, integers
from repkern.data.section import Section

__all__ = ["Crop"]

_MODES = {"zeros": "constant", "reflect": "reflect", "border": "replicate"}


class Crop(Section):
    """Each image padded on all sides, and a window of its own size cut out at a random place."""

    name: Literal["crop"] = "crop"
    padding: int = Field(4, ge=1, description="pixels on each side")
    mode: Literal["zeros", "reflect", "border"] = Field("zeros", description="what the padding is filled with")

    def __call__(self, images: Tensor, draws: UniformDraws) -> Tensor:
        """Images [N, C, H, W] of any C, floating, to the same shape. ValueError to reflect more than an image has."""
        check_images(images)
        count, _, height, width = images.shape
        if self.mode == "reflect" and self.padding >= min(height, width):
            raise ValueError(f"padding by reflection must be less than the side of images, {height}x{width}, "
                             f"got {self.padding}")  # fmt: skip
        offsets = integers(draw(images, draws, "crop/offset", 2), 2 * self.padding + 1).to(images.device)
        if count == 0:
            return images
        padded = functional.pad(images, [self.padding] * 4, mode=_MODES[self.mode])
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, 2p + 1, 2p + 1, H, W], a view
        return windows[torch.arange(count, device=images.device), :, offsets[:, 0], offsets[:, 1]]
