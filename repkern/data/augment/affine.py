"""Random rotation, scale and translation."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from repkern.data.augment._sampling import UniformDraws, check_images, draw
from repkern.data.augment._warp import warp
from repkern.data.section import Section

__all__ = ["Affine"]


class Affine(Section):
    """Each image turned, scaled and moved by amounts drawn evenly up to the given ones, in one bilinear sampling."""

    name: Literal["affine"] = "affine"
    degrees: float = Field(10.0, ge=0, le=180, description="largest angle, either way")
    scale: float = Field(0.1, ge=0, lt=1, description="largest change of size: 0.1 is 90 to 110 %")
    translate: float = Field(0.125, ge=0, le=1, description="largest shift, as a part of the side")
    strength: float = Field(1.0, ge=0, description="factor on all three")
    padding: Literal["border", "zeros", "reflection"] = Field("border", description="what comes in from outside")

    @model_validator(mode="after")
    def _shrinks(self) -> Affine:
        if self.scale * self.strength >= 1:
            raise ValueError(f"scale * strength must be below 1, got {self.scale} * {self.strength}")
        return self

    def __call__(self, images: Tensor, draws: UniformDraws) -> Tensor:
        """Images [N, C, H, W] of any C, floating, to the same shape."""
        check_images(images)
        if self.strength == 0 or self.degrees == self.scale == self.translate == 0:
            return images
        height, width = images.shape[2:]
        drawn = draw(images, draws, "affine/parameters", 4).tolist()
        rows = [self._matrix([2 * value - 1 for value in values], height, width) for values in drawn]
        return warp(images, torch.tensor(rows, dtype=torch.float32).reshape(-1, 6), padding=self.padding)

    def _matrix(self, drawn: list[float], height: int, width: int) -> list[float]:
        angle = math.radians(self.degrees) * self.strength * drawn[0]
        scale = 1 + self.scale * self.strength * drawn[1]
        right, down = (self.translate * self.strength * value for value in drawn[2:])
        turn, shear = scale * math.cos(angle), scale * math.sin(angle)
        return [turn, -shear, right * width, shear, turn, down * height]
