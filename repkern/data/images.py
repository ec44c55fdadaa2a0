"""One image file as 8-bit grey or RGB pixels, whatever was in it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from repkern.data.errors import MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SUFFIXES", "decode", "open_image", "pixels_of", "size_of"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm")
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 are those that swap width and height
_MODES = {1: "L", 3: "RGB"}


def open_image(file: str | Path | bytes) -> Image:
    """The header of an image file, or of its bytes; pixels are read when they are asked for.

    OSError and what the decoders of Pillow raise about files that are none; MissingExtraError without Pillow.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("reading images needs Pillow: pip install 'repkern[train]'") from None
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)


def size_of(image: Image) -> tuple[int, int]:
    """Width and height as the image is to be seen."""
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def decode(image: Image, channels: int, at_least: tuple[int, int] | None = None) -> Image:
    """Mode L for 1 channel, RGB for 3, upright as EXIF says. The first frame of several.

    16-bit values are divided by 257 and rounded; of floating ones, 0 is black and 1 white. Transparent pixels stand on
    white. Colour becomes grey by ITU-R 601. A JPEG larger than twice `at_least` (width, height) is decoded at a half, a
    quarter or an eighth of its size, and is then still as large as that.
    """
    turn = _orientation(image)
    if at_least is not None and image.format == "JPEG":
        image.draft(_MODES[channels], at_least[::-1] if turn >= 5 else at_least)
    image.load()
    if turn != 1:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    return _eight_bits(image, _MODES[channels])


def pixels_of(image: Image) -> Tensor:
    """[C, H, W] uint8 of an image of mode L or RGB."""
    values = torch.from_numpy(numpy.array(image))
    return values.unsqueeze(0) if values.dim() == 2 else values.permute(2, 0, 1)


def _orientation(image: Image) -> int:
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata of an image that is whole
        return 1
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def _eight_bits(image: Image, mode: str) -> Image:
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        image = _from_wide(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = _on_white(image)
    return image if image.mode == mode else image.convert(mode)


def _from_wide(image: Image) -> Image:
    """Mode L of one with more than 8 bits a pixel."""
    from PIL import Image as images

    values = numpy.asarray(image).astype(numpy.float64)
    top = 1.0 if image.mode.startswith("F") else 65535.0
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not 0 <= low <= high <= top:
        raise ValueError(f"its values go from {low:g} to {high:g}, those of mode {image.mode} are read as 0 to {top:g}")
    return images.fromarray((values * (255 / top) + 0.5).astype(numpy.uint8))


def _on_white(image: Image) -> Image:
    from PIL import Image as images

    layer = image.convert("RGBA")
    return images.alpha_composite(images.new("RGBA", layer.size, "white"), layer).convert("RGB")
