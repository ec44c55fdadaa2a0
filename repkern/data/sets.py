"""Sets of images: in memory, or read one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from repkern.data.errors import MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageSet", "MemoryData", "digest"]


class ImageSet(Protocol):
    """Images by number. Sets are sent to worker processes, so they keep no open files."""

    classes: tuple[str, ...]
    channels: int
    labels: Tensor  # [N] int64

    def __len__(self) -> int: ...

    def open(self, number: int) -> Image:
        """An image, its pixels not read yet. Any exception means that it is missing or damaged."""

    def name_of(self, number: int) -> str:
        """Where an image is, for messages."""

    def take(self, numbers: Tensor) -> ImageSet:
        """The set of the images with these numbers [M] int64, in their order."""

    def describe(self) -> dict[str, Any]:
        """JSON values that differ between sets of other images, or in another order."""


class MemoryData:
    """Images that are in memory: [N, C, H, W] with their labels [N] int64.

    uint8 images have values from 0 to `top`, which stands for 1; floating ones are taken as they are, in [0, 1] where
    an augmentation asks for that. `classes` are the names; without, the numbers up to the largest label.
    `about` is what `describe` tells instead of sums of the values.
    ValueError and TypeError for tensors of other shapes and dtypes, and for labels that are no classes.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str] | None = None,
        *,
        top: int = 255,
        about: dict[str, Any] | None = None,
    ) -> None:
        if images.dim() != 4:
            raise ValueError(f"images must be [N, C, H, W], got {list(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images must be uint8 or floating, got {images.dtype}")
        if labels.shape != (len(images),):
            raise ValueError(f"labels must be [{len(images)}], one an image, got {list(labels.shape)}")
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if not 0 < top <= 255:
            raise ValueError(f"top must be from 1 to 255, got {top}")
        self.images, self.labels, self.top = images.detach().cpu().contiguous(), labels.to("cpu", torch.int64), top
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
        self.classes = tuple(map(str, range(high + 1) if classes is None else classes))
        if low < 0 or high >= len(self.classes):
            raise ValueError(f"labels must be in [0, {len(self.classes)}), one of the classes, got {low} to {high}")
        self.channels = int(images.shape[1])
        self._about, self._named = about, classes is not None

    def __len__(self) -> int:
        return len(self.images)

    def open(self, number: int) -> Image:
        """An image of 1 or 3 channels for Pillow to crop and resize. ValueError for floating images."""
        try:
            from PIL import Image
        except ImportError:
            raise MissingExtraError("resizing images needs Pillow: pip install 'repkern[train]'") from None
        pixels = self.images[number]
        if pixels.dtype != torch.uint8:
            raise ValueError(f"images are cropped and resized as uint8, got {pixels.dtype}")
        if self.top != 255:
            pixels = (pixels.float() * (255 / self.top)).round().to(torch.uint8)
        return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).contiguous().numpy())

    def name_of(self, number: int) -> str:
        """Its number, as there is no file."""
        return f"image {number}"

    def take(self, numbers: Tensor) -> MemoryData:
        """The set of the images with these numbers [M] int64, in their order."""
        return MemoryData(self.images[numbers], self.labels[numbers], self.classes, top=self.top)

    def named_like(self, other: Sequence[str]) -> MemoryData:
        """This set with the classes of another one, if it was given none. ValueError for labels that are not in it."""
        if self._named or self.classes == tuple(other):
            return self
        return MemoryData(self.images, self.labels, other, top=self.top, about=self._about)

    def describe(self) -> dict[str, Any]:
        """Sums of images and labels."""
        if self._about is not None:
            return self._about
        return {
            "images": len(self),
            "classes": list(self.classes),
            "sum": digest(self.images.view(torch.uint8).numpy().tobytes(), self.labels.numpy().tobytes()),
        }


def digest(*parts: bytes) -> str:
    """SHA-256 of the parts and their lengths."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()
