"""Which part of an image is used, and at which size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from repkern.data.draws import Draws
from repkern.data.images import decode, pixels_of, size_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Framing"]

_Box = tuple[float, float, float, float]
_CROP_STREAM = 2**32 - 2
_ATTEMPTS = 10


@dataclass(frozen=True)
class Framing:
    """How the pixels of a batch are cut out of images.

    With `size` 0 an image is used as it is. Otherwise the middle is: the square whose side is `test_crop` times the
    shorter side, resized to [size, size]. With `crop_scale`, training images are a random rectangle instead, whose area
    is in `crop_scale` times that of the image, and whose width over height is in `crop_ratio` (the crop of Inception,
    1409.4842), drawn from the counter.
    """

    size: int = 0
    channels: int = 3
    test_crop: float = 1.0
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, got {self.channels}")
        if not 0 < self.test_crop <= 1:
            raise ValueError(f"test_crop must be above 0 and at most 1, got {self.test_crop}")
        if self.crop_scale is None:
            return
        if not self.size:
            raise ValueError("random crops need image_size, the size that they are resized to")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two parts of the area, the smaller one first, got {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must be two ratios, the smaller one first, got {self.crop_ratio}")

    def keeps(self, width: int, height: int) -> bool:
        """Whether every image of this size is used as it is, in training too."""
        return self.crop_scale is None and (not self.size or (self.test_crop == 1 and width == height == self.size))

    def numbers(self, draws: Draws) -> Tensor:
        """The random numbers [N, 40] of the crops of N training images."""
        return draws.uniform(_CROP_STREAM, 4 * _ATTEMPTS)

    def read(self, image: Image, numbers: Tensor | None = None) -> Tensor:
        """The pixels [channels, size, size] uint8 of an opened image; with `numbers` [40], of its random crop."""
        width, height = size_of(image)
        if not self.size:
            return pixels_of(decode(image, self.channels))
        if numbers is None or self.crop_scale is None:
            return self._resized(decode(image, self.channels), self._middle(width, height))
        left, top, right, bottom = self._random(width, height, numbers.tolist())
        fewest = (math.ceil(width * self.size / (right - left)), math.ceil(height * self.size / (bottom - top)))
        decoded = decode(image, self.channels, fewest)
        across, down = decoded.width / width, decoded.height / height
        return self._resized(decoded, (left * across, top * down, right * across, bottom * down))

    def _resized(self, image: Image, box: _Box) -> Tensor:
        from PIL.Image import Resampling

        side = (self.size, self.size)
        if image.size == side and box == (0, 0, *side):
            return pixels_of(image)
        method = Resampling.BICUBIC if self.interpolation == "bicubic" else Resampling.BILINEAR
        return pixels_of(image.resize(side, method, box))

    def _middle(self, width: int, height: int) -> _Box:
        side = self.test_crop * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def _random(self, width: int, height: int, numbers: list[float]) -> _Box:
        """A rectangle of whole pixels. After ten that do not fit, the largest in the middle with an allowed ratio."""
        assert self.crop_scale is not None
        low, high = self.crop_scale
        first, last = (math.log(ratio) for ratio in self.crop_ratio)
        for at in range(0, len(numbers), 4):
            area, ratio, across, down = numbers[at : at + 4]
            area = width * height * (low + (high - low) * area)
            ratio = math.exp(first + (last - first) * ratio)
            wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                left, top = int(across * (width - wide + 1)), int(down * (height - tall + 1))
                return left, top, left + wide, top + tall
        wide = min(width, max(1, round(height * self.crop_ratio[1])))
        tall = min(height, max(1, round(width / self.crop_ratio[0])))
        left, top = (width - wide) // 2, (height - tall) // 2
        return left, top, left + wide, top + tall
