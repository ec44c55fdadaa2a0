"""Random changes of color."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from repkern.data.augment._colors import grey
from repkern.data.augment._operations import Operation, apply_operations
from repkern.data.augment._sampling import UniformDraws, between, check_images, column, draw, normals
from repkern.data.section import Section

__all__ = ["Grayscale", "Jitter", "Lighting"]

_OPERATIONS = {"brightness": "brightness", "contrast": "contrast", "saturation": "color", "hue": "hue"}
# Principal axes of the colors of ImageNet (in columns) and their standard deviations, as the released training of
# DiverseBranchBlock has them from Torch's first ResNets.
_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_DEVIATIONS = (0.2175, 0.0188, 0.0045)


class Jitter(Section):
    """Brightness, contrast and saturation times a factor of 1 - x to 1 + x, and hue turned by -x to x of a circle.

    Each image has its own factors, and its own order of the four. On images of one channel there is no saturation and
    no hue: these two change nothing.
    """

    name: Literal["jitter"] = "jitter"
    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.4, ge=0)
    hue: float = Field(0.0, ge=0, le=0.5)
    probability: float = Field(1.0, ge=0, le=1, description="of changing an image at all")

    def __call__(self, images: Tensor, draws: UniformDraws) -> Tensor:
        """Images [N, 1 or 3, H, W] floating in [0, 1], to the same shape. MissingExtraError without kornia."""
        check_images(images, colors=True)
        apply = draw(images, draws, "jitter/apply")[:, 0] < self.probability
        order = draw(images, draws, "jitter/order", 4)
        drawn = draw(images, draws, "jitter/factors", 4)
        active = [index for index, name in enumerate(_OPERATIONS) if getattr(self, name) > 0]
        ranks = order[:, active].argsort(dim=1, stable=True).tolist()
        arguments = torch.stack([self._arguments(name, drawn[:, i]) for i, name in enumerate(_OPERATIONS)], 1).tolist()
        names = list(_OPERATIONS.values())
        for turn in range(len(active)):
            chosen = []
            for image, changes in enumerate(apply.tolist()):
                kind = active[ranks[image][turn]]
                chosen.append(Operation(names[kind], arguments[image][kind]) if changes else Operation("identity"))
            images = apply_operations(images, chosen, fill=0.0, nearest=False)
        return images

    def _arguments(self, name: str, uniform: Tensor) -> Tensor:
        most: float = getattr(self, name)
        return between(uniform, -most, most) if name == "hue" else between(uniform, max(0.0, 1 - most), 1 + most)


class Lighting(Section):
    """AlexNet's noise: one color along the principal axes of ImageNet's added to an image, cut off at 0 and 1.

    Nothing happens to images of one channel.
    """

    name: Literal["lighting"] = "lighting"
    deviation: float = Field(0.1, ge=0, description="standard deviation, as a part of that of the axes")

    def __call__(self, images: Tensor, draws: UniformDraws) -> Tensor:
        """Images [N, 1 or 3, H, W] floating in [0, 1], to the same shape."""
        check_images(images, colors=True)
        if self.deviation == 0 or images.shape[1] == 1:
            return images
        noise = normals(draw(images, draws, "lighting/noise", 3)).tolist()
        shifts = []
        for alphas in noise:
            along = [self.deviation * alpha * size for alpha, size in zip(alphas, _DEVIATIONS, strict=True)]
            shifts.append([sum(a * b for a, b in zip(row, along, strict=True)) for row in _AXES])
        shift = torch.tensor(shifts, dtype=torch.float32).reshape(-1, 3, 1, 1)
        return (images + shift.to(images.device, images.dtype)).clamp(0, 1)


class Grayscale(Section):
    """Some of the images without their color. Nothing happens to images of one channel."""

    name: Literal["grayscale"] = "grayscale"
    probability: float = Field(0.1, ge=0, le=1)

    def __call__(self, images: Tensor, draws: UniformDraws) -> Tensor:
        """Images [N, 1 or 3, H, W] floating in [0, 1], to the same shape."""
        check_images(images, colors=True)
        if images.shape[1] == 1:
            return images
        chosen = draw(images, draws, "grayscale/apply")[:, 0] < self.probability
        return torch.where(column(chosen, images), grey(images), images)
