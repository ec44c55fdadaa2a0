"""The operations of RandAugment, AutoAugment and TrivialAugment, on a batch in which every image has its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repkern.data.augment import _colors
from repkern.data.augment._warp import warp
from repkern.data.augment.erasing import box_mask

__all__ = ["IDENTITY", "Operation", "apply_operations"]


class Operation(NamedTuple):
    """What one image gets. `place` is where a cutout is, as parts of height and width."""

    name: str
    argument: float = 0.0
    place: tuple[float, float] = (0.0, 0.0)


IDENTITY = Operation("identity")

_COLORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    name: getattr(_colors, name) for name in _colors.__all__ if name != "grey"
}

# Rows (a, b, c, d, e, f) of `warp` from argument, height and width. Shears keep the upper left corner, as Pillow's
# affine transform does, on which the papers' training is built.
_WARPS: dict[str, Callable[[float, int, int], list[float]]] = {
    "rotate": lambda degrees, height, width: _rotation(math.radians(degrees)),
    "shear_x": lambda factor, height, width: [1, factor, factor * height / 2, 0, 1, 0],
    "shear_y": lambda factor, height, width: [1, 0, 0, factor, 1, factor * width / 2],
    "translate_x": lambda part, height, width: [1, 0, part * width, 0, 1, 0],
    "translate_y": lambda part, height, width: [1, 0, 0, 0, 1, part * height],
    "shift_x": lambda pixels, height, width: [1, 0, pixels, 0, 1, 0],
    "shift_y": lambda pixels, height, width: [1, 0, 0, 0, 1, pixels],
}


def apply_operations(images: Tensor, chosen: Sequence[Operation], *, fill: float, nearest: bool) -> Tensor:
    """One operation per image of [N, C, H, W], with as few calls as there are kinds of them.

    All that move pixels are one call. `fill` is the value of what comes in from outside, `nearest` how it is sampled.
    """
    members: dict[str, list[int]] = {}
    for index, operation in enumerate(chosen):
        if operation.name != "identity":
            members.setdefault("warp" if operation.name in _WARPS else operation.name, []).append(index)
    result = images.clone() if members else images
    for name, indices in members.items():
        at = torch.tensor(indices, device=images.device)
        operations = [chosen[index] for index in indices]
        if name == "warp":
            changed = _warped(images[at], operations, fill, nearest)
        elif name == "cutout":
            changed = _cut(images[at], operations, fill)
        else:
            changed = _COLORS[name](images[at], torch.tensor([operation.argument for operation in operations]))
        result[at] = changed
    return result


def _warped(images: Tensor, operations: Sequence[Operation], fill: float, nearest: bool) -> Tensor:
    height, width = images.shape[2:]
    rows = [_WARPS[operation.name](operation.argument, height, width) for operation in operations]
    moved = warp(images, torch.tensor(rows, dtype=torch.float32), fill=fill, nearest=nearest)
    return moved.clamp(0, 1)  # the four weights of a pixel may round to more than 1


def _cut(images: Tensor, operations: Sequence[Operation], fill: float) -> Tensor:
    """Squares of `argument` of the shorter side, and of 2 pixels at least, filled."""
    height, width = images.shape[2:]
    boxes = []
    for _, argument, (down, across) in operations:
        half, row, column = max(2, int(argument * min(height, width))) // 2, int(down * height), int(across * width)
        boxes.append((row - half, row + half, column - half, column + half))
    return torch.where(box_mask(boxes, images), torch.full((), fill, dtype=images.dtype, device=images.device), images)


def _rotation(angle: float) -> list[float]:
    """Counterclockwise about the centre."""
    return [math.cos(angle), -math.sin(angle), 0, math.sin(angle), math.cos(angle), 0]
