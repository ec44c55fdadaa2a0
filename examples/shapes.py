"""Pictures for the examples, drawn on the spot: circles, squares, triangles, crosses and a few more, in any color."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

Box = tuple[float, float, float, float]
Draw = Callable[[ImageDraw.ImageDraw, Box, str], None]


def polygon(*points: tuple[float, float]) -> Draw:
    """A shape with these corners, in parts of its box."""

    def draw(canvas: ImageDraw.ImageDraw, box: Box, color: str) -> None:
        left, top, right, bottom = box
        canvas.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in points], fill=color)

    return draw


SHAPES: dict[str, Draw] = {
    "circle": lambda canvas, box, color: canvas.ellipse(box, fill=color),
    "square": lambda canvas, box, color: canvas.rectangle(box, fill=color),
    "triangle": polygon((0.5, 0), (1, 1), (0, 1)),
    "cross": polygon(
        (0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65), (0.65, 0.65),
        (0.65, 1), (0.35, 1), (0.35, 0.65), (0, 0.65), (0, 0.35), (0.35, 0.35),
    ),
    "ring": lambda canvas, box, color: canvas.ellipse(box, outline=color, width=3),
    "frame": lambda canvas, box, color: canvas.rectangle(box, outline=color, width=3),
    "diamond": polygon((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
}  # fmt: skip


def picture(name: str, size: int, draws: random.Random) -> Image.Image:
    """One shape of any place, size and color on a background with noise: an RGB image of `size` pixels a side."""
    image = Image.frombytes("RGB", (size, size), draws.randbytes(3 * size * size)).point(lambda value: value * 3 // 8)
    side = draws.uniform(0.4, 0.8) * size
    left, top = draws.uniform(0, size - side), draws.uniform(0, size - side)
    color = f"hsl({draws.randrange(360)}, {draws.randrange(40, 100)}%, {draws.randrange(50, 80)}%)"
    SHAPES[name](ImageDraw.Draw(image), (left, top, left + side, top + side), color)
    return image


def draw_shapes(names: Sequence[str], count: int, size: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` pictures of the shapes in turn: images [N, 3, size, size] uint8 and labels [N] int64."""
    draws = random.Random(seed)
    labels = torch.arange(count) % len(names)
    pictures = [np.array(picture(names[label], size, draws)) for label in labels.tolist()]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), labels


def write_folder(folder: Path, names: Sequence[str], train: int, test: int, size: int = 48) -> Path:
    """A folder of pictures as torchvision's ImageFolder wants it: `train` and `test` pictures of each shape as PNG."""
    draws = random.Random(1)
    for part, count in (("train", train), ("test", test)):
        for name in names:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                picture(name, size, draws).save(folder / part / name / f"{number:03}.png")
    return folder
