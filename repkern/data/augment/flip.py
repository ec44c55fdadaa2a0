"""Random mirroring."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from repkern.data.augment._sampling import UniformDraws, check_images, column, draw
from repkern.data.section import Section

__all__ = ["Flip"]


class Flip(Section):
    """Each image mirrored left to right, and top to bottom, with a probability for either."""

    name: Literal["flip"] = "flip"
    horizontal: float = Field(0.5, ge=0, le=1, description="probability of left to right")
    vertical: float = Field(0.0, ge=0, le=1, description="probability of top to bottom")

    def __call__(self, images: Tensor, draws: UniformDraws) -> Tensor:
        """Images [N, C, H, W] of any C, floating, to the same shape."""
        check_images(images)
        for axis, way, probability in ((3, "horizontal", self.horizontal), (2, "vertical", self.vertical)):
            if probability > 0:
                chosen = draw(images, draws, f"flip/{way}")[:, 0] < probability
                images = torch.where(column(chosen, images), images.flip(axis), images)
        return images
