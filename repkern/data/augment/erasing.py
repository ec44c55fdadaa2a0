"""Random rectangles painted over: random erasing (1708.04896) and cutout (1708.04552)."""

from __future__ import annotations

import math
from typing import Literal

import numpy
import torch
from pydantic import Field, model_validator
from torch import Tensor

from repkern.data.augment._sampling import UniformDraws, check_images, column, draw
from repkern.data.section import Section

__all__ = ["Cutout", "Erasing", "box_mask"]

_ATTEMPTS = 10
_KEYS = 4  # draws that a generator of noise is keyed by
Box = tuple[int, int, int, int]  # top, bottom, left, right; the ends are not in it


def box_mask(boxes: list[Box], images: Tensor) -> Tensor:
    """[N, 1, H, W] bool, true inside each image's box; boxes may reach over the edges."""
    edges = torch.tensor(boxes, dtype=torch.int64, device=images.device).reshape(-1, 4)
    top, bottom, left, right = (edge[:, None, None, None] for edge in edges.unbind(1))
    rows = torch.arange(images.shape[2], device=images.device)[:, None]
    columns = torch.arange(images.shape[3], device=images.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


class Erasing(Section):
    """A rectangle of random area and shape, painted over in some of the images.

    Area and ratio are drawn up to ten times, until the rectangle fits; an image where none does stays as it is.
    """

    name: Literal["erasing"] = "erasing"
    probability: float = Field(0.5, ge=0, le=1)
    area: tuple[float, float] = Field((0.02, 1 / 3), description="smallest and largest part of the image")
    ratio: tuple[float, float] = Field((0.3, 1 / 0.3), description="height by width, even in its logarithm")
    fill: Literal["noise", "color", "value"] = Field(
        "noise", description="a random value for every pixel, one random color, or `value`"
    )
    value: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Erasing:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area must be 0 < smallest <= largest <= 1, got {self.area}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < smallest <= largest, got {self.ratio}")
        return self

    def __call__(self, images: Tensor, draws: UniformDraws) -> Tensor:
        """Images [N, C, H, W] of any C, floating, to the same shape."""
        check_images(images)
        apply = draw(images, draws, "erasing/apply")[:, 0] < self.probability
        shapes = draw(images, draws, "erasing/shape", 2 * _ATTEMPTS).tolist()
        places = draw(images, draws, "erasing/place", 2).tolist()
        fills = draw(images, draws, "erasing/fill", max(_KEYS, images.shape[1]))
        result = images.clone()
        for index in apply.nonzero().flatten().tolist():
            top, bottom, left, right = self._box(shapes[index], places[index], images.shape[2], images.shape[3])
            box = result[index, :, top:bottom, left:right]
            if box.numel():
                box.copy_(self._paint(fills[index], box))
        return result

    def _box(self, shape: list[float], place: list[float], height: int, width: int) -> Box:
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for size, form in zip(shape[::2], shape[1::2], strict=True):
            area = height * width * (self.area[0] + (self.area[1] - self.area[0]) * size)
            ratio = math.exp(low + (high - low) * form)
            tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < tall < height and 0 < wide < width:
                top, left = int(place[0] * (height - tall + 1)), int(place[1] * (width - wide + 1))
                return top, top + tall, left, left + wide
        return 0, 0, 0, 0

    def _paint(self, drawn: Tensor, box: Tensor) -> Tensor:
        if self.fill == "value":
            return torch.tensor(self.value)
        return _noise(drawn[:_KEYS], box) if self.fill == "noise" else drawn[: len(box), None, None]


def _noise(key: Tensor, box: Tensor) -> Tensor:
    """Uniform numbers for a box, from a generator keyed by draws: thousands of draws an image would cost too much."""
    number = sum(int(value * 2**24) << (24 * place) for place, value in enumerate(key.tolist()))
    words = numpy.random.Philox(key=number).random_raw(box.numel()) >> numpy.uint64(40)
    return torch.from_numpy(words.astype(numpy.float32) * numpy.float32(2**-24)).reshape(box.shape)


class Cutout(Section):
    """A square around a random pixel painted over; what reaches over the edge is cut off."""

    name: Literal["cutout"] = "cutout"
    size: int = Field(16, ge=1, description="side of the square, in pixels")
    probability: float = Field(1.0, ge=0, le=1)
    value: float = Field(0.5, ge=0, le=1, description="what it is filled with")

    def __call__(self, images: Tensor, draws: UniformDraws) -> Tensor:
        """Images [N, C, H, W] of any C, floating, to the same shape."""
        check_images(images)
        height, width = images.shape[2:]
        chosen = draw(images, draws, "cutout/apply")[:, 0] < self.probability
        boxes = [self._box(place, height, width) for place in draw(images, draws, "cutout/place", 2).tolist()]
        paint = torch.full((), self.value, dtype=images.dtype, device=images.device)
        return torch.where(box_mask(boxes, images) & column(chosen, images), paint, images)

    def _box(self, place: list[float], height: int, width: int) -> Box:
        top, left = int(place[0] * height) - self.size // 2, int(place[1] * width) - self.size // 2
        return top, top + self.size, left, left + self.size
