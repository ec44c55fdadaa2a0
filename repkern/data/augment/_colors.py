"""Operations on the values of pixels, each image with its own argument.

They mean what Pillow's ImageOps and ImageEnhance mean, on values in [0, 1] instead of 8-bit levels. What is written out
here is what kornia would compute by a sum whose order depends on the batch or the number of threads (means,
convolutions, fused multiply-add), or not compute as Pillow does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repkern.data.augment._kornia import enhance
from repkern.data.augment._sampling import column

__all__ = [
    "autocontrast", "brightness", "color", "contrast", "equalize", "grey", "hue", "invert", "posterize", "sharpness",
    "solarize", "solarize_add",
]  # fmt: skip

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow
_LUMA_16 = (19595, 38470, 7471)  # the same in 16 bits after the point


def grey(images: Tensor) -> Tensor:
    """[N, 1, H, W]: the luma of [N, 3, H, W], or the one channel there is."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (images[:, index : index + 1] * weight for index, weight in enumerate(_LUMA))
    return red + green + blue


def _mean_level(images: Tensor) -> Tensor:
    """The mean luma [N, 1, 1, 1], rounded to 8 bits twice as Pillow does. A sum of integers has no order."""
    levels = (images * 255).round().long()
    if images.shape[1] == 3:
        red, green, blue = (levels[:, index] * weight for index, weight in enumerate(_LUMA_16))
        levels = (red + green + blue + 2**15) >> 16
    pixels = images.shape[2] * images.shape[3]
    mean = (2 * levels.flatten(1).sum(1) + pixels) // (2 * pixels)
    return column(mean.to(images.dtype) / 255, images)


def _blend(start: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """`start` at factor 0, the images at 1, and beyond."""
    share = column(factors, images)
    return (start * (1 - share) + images * share).clamp(0, 1)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Black at factor 0."""
    result: Tensor = enhance().adjust_brightness_accumulative(images, factors.to(images.dtype))
    return result


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Grey at factor 0. Images of one channel stay as they are."""
    return images if images.shape[1] == 1 else _blend(grey(images), images, factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """The mean luma at factor 0."""
    return _blend(_mean_level(images), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Smoothed by (1 1 1, 1 5 1, 1 1 1) / 13 at factor 0; the outermost pixels stay."""
    height, width = images.shape[2:]
    if min(height, width) < 3:
        return images
    inner = images[:, :, 1:-1, 1:-1]
    total = inner * 4
    for down in range(3):
        for across in range(3):
            total = total + images[:, :, down : down + height - 2, across : across + width - 2]
    return torch.cat(
        [
            images[:, :, :1],
            torch.cat([images[:, :, 1:-1, :1], _blend(total / 13, inner, factors), images[:, :, 1:-1, -1:]], dim=3),
            images[:, :, -1:],
        ],
        dim=2,
    )


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Hue turned by parts of the whole circle, -0.5 to 0.5. Images of one channel stay as they are."""
    if images.shape[1] == 1:
        return images
    result: Tensor = enhance().adjust_hue(images, turns.to(images.dtype) * (2 * torch.pi))
    return result.clamp(0, 1)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """The negative."""
    return 1 - images


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Levels from a threshold of 0 to 256 on inverted."""
    result: Tensor = enhance().solarize(images, (thresholds / 255).to(images.dtype))
    return result


def solarize_add(images: Tensor, levels: Tensor) -> Tensor:
    """`levels` of 255 added to what is darker than 128."""
    lighter = (images + column(levels / 255, images)).clamp(max=1)
    return torch.where(images < 128 / 255, lighter, images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The highest 0 to 8 bits kept."""
    result: Tensor = enhance().posterize(images, bits.long())
    return result


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Each channel with an even histogram."""
    result: Tensor = enhance().equalize(images)
    return result


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to all of [0, 1]; a channel of one value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (images - low) / torch.where(span > 0, span, 1), images)
