"""Parameters of augmentations as functions of each sample's own draws, so that no result depends on its neighbours.

What a parameter goes through per sample (sines, roots, exponentials) is computed by Python's `math`, one number after
the other: a vectorized function may round the last elements of a tensor otherwise than those in its middle.
"""

from __future__ import annotations

import zlib
from statistics import NormalDist
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["UniformDraws", "between", "check_images", "column", "draw", "integers", "normals", "signs", "stream_number"]

_STREAMS = 2**32 - 16  # the last ones are for reading and ordering images
_ROUNDING = 1e-3  # interpolation may reach a little beyond


class UniformDraws(Protocol):
    """What an augmentation needs of `repkern.data.draws.Draws`."""

    def uniform(self, stream: int, count: int = 1) -> Tensor:
        """[N, count] float32 in [0, 1)."""


def stream_number(purpose: str) -> int:
    """The number of the stream of a purpose, such as "flip/horizontal": its CRC-32, below 2**32 - 16."""
    return zlib.crc32(purpose.encode()) % _STREAMS


def check_images(images: Tensor, *, colors: bool = False) -> None:
    """Images are [N, C, H, W] floating; with `colors`, C is 1 or 3 and values are in [0, 1]. Errors otherwise.

    TypeError for what is no floating-point tensor, ValueError for the rest.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor with values in [0, 1], got {got}")
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images must be [N, C, H, W], got shape {list(images.shape)}")
    if not colors:
        return
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels here, got {images.shape[1]}")
    low, high = (float(value) for value in images.aminmax()) if len(images) else (0.0, 1.0)
    if not -_ROUNDING <= low <= high <= 1 + _ROUNDING:
        raise ValueError(f"images must be in [0, 1] here, before they are normalized, got {low:g} to {high:g}")


def draw(images: Tensor, draws: UniformDraws, purpose: str, count: int = 1) -> Tensor:
    """The draws [N, count] of a purpose on the CPU. ValueError when they are not those of N images."""
    drawn = draws.uniform(stream_number(purpose), count)
    if drawn.shape != (len(images), count):
        raise ValueError(f"draws of {len(drawn)} samples do not fit {len(images)} images")
    return drawn


def between(uniform: Tensor, low: float, high: float) -> Tensor:
    """Uniform in [low, high]."""
    return uniform * (high - low) + low


def integers(uniform: Tensor, count: int) -> Tensor:
    """int64 in 0, ..., count - 1."""
    return (uniform * count).floor().long().clamp(max=count - 1)  # rounding can reach `count`


def signs(uniform: Tensor) -> Tensor:
    """-1 or 1, as often."""
    return 1 - 2 * (uniform < 0.5).to(uniform.dtype)


def normals(uniform: Tensor) -> Tensor:
    """Standard normal numbers by the inverse of their distribution function, of any shape, float32."""
    inverse = NormalDist().inv_cdf
    half_step = 2.0**-25  # draws are multiples of 2**-24, and 0 has no inverse
    values = [inverse(value + half_step) for value in uniform.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float32).reshape(uniform.shape)


def column(values: Tensor, images: Tensor) -> Tensor:
    """One value per image [N] as [N, 1, 1, 1] on the device of the images; floating ones in their dtype."""
    dtype = images.dtype if values.is_floating_point() else values.dtype
    return values.to(images.device, dtype).reshape(-1, 1, 1, 1)
