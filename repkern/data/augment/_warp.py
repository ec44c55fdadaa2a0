"""Affine maps of images, each with its own matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["warp"]


def warp(
    images: Tensor, matrices: Tensor, *, padding: str = "zeros", nearest: bool = False, fill: float = 0.0
) -> Tensor:
    """out(x, y) = image(a x + b y + c, d x + e y + f), in pixels from the centre of the image.

    images: [N, C, H, W] floating. matrices: [N, 6] on the CPU, rows (a, b, c, d, e, f). padding: "zeros" (then what
    comes in has the value `fill`), "border" or "reflection".
    """
    height, width = images.shape[2:]
    grid = _grid(matrices.to(images.device, images.dtype), height, width)
    shift = fill if padding == "zeros" else 0.0
    moved = functional.grid_sample(
        images - shift if shift else images,
        grid,
        mode="nearest" if nearest else "bilinear",
        padding_mode=padding,
        align_corners=False,
    )
    return moved + shift if shift else moved


def _grid(matrices: Tensor, height: int, width: int) -> Tensor:
    """Sampling positions [N, H, W, 2] in [-1, 1]; not torch's affine_grid, whose matrix product rounds by batch."""
    across = torch.arange(width, device=matrices.device, dtype=matrices.dtype) - (width - 1) / 2
    down = (torch.arange(height, device=matrices.device, dtype=matrices.dtype) - (height - 1) / 2)[:, None]
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    return torch.stack([(a * across + b * down + c) * (2 / width), (d * across + e * down + f) * (2 / height)], dim=-1)
