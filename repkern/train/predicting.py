"""The classes of single images, as a trained network sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repkern.data import DataRecipe, Framing
from repkern.data.folders import read_file
from repkern.data.opening import statistics_of

__all__ = ["Prediction", "predict"]

_TOGETHER = 32  # images


class Prediction(NamedTuple):
    """An image and its likeliest classes, (name, probability), the likeliest first."""

    path: str
    classes: list[tuple[str, float]]

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"image": self.path, "classes": [{"class": name, "probability": p} for name, p in self.classes]}


def predict(
    model: nn.Module,
    paths: Sequence[str | Path],
    classes: Sequence[str],
    data: DataRecipe,
    *,
    channels: int,
    image_size: int,
    top: int = 5,
    device: str | torch.device = "cpu",
) -> Iterator[Prediction]:
    """The `top` likeliest of `classes` for every image file, in order; images are prepared as test images of `data`.

    image_size: their side, 0 for that of each file. FileNotFoundError and ValueError for files that are no images;
    ValueError for a network with another number of outputs, and for images that it does not take.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    framing = Framing(size=image_size, channels=channels, test_crop=data.test_crop, interpolation=data.interpolation)
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in statistics_of(data, channels))
    model = model.to(device).eval()
    rest = iter(paths)
    while chosen := list(islice(rest, _TOGETHER)):
        pixels = [(read_file(Path(path), framing).float() / 255 - mean) / std for path in chosen]
        alike = len({image.shape for image in pixels}) == 1
        for images in [torch.stack(pixels)] if alike else [image[None] for image in pixels]:
            for scores in _scores(model, images.to(device), len(classes)):
                yield _prediction(chosen.pop(0), scores, classes, top)


@torch.no_grad()
def _scores(model: nn.Module, images: Tensor, classes: int) -> Tensor:
    parameter = next(iter(model.parameters()), images)
    try:
        scores: Tensor = model(images.to(parameter.dtype))
    except RuntimeError as problem:
        shape = "x".join(map(str, images.shape[1:]))
        raise ValueError(f"the network does not take images of {shape}: {str(problem).splitlines()[0]}") from None
    if scores.shape[1] != classes:
        raise ValueError(f"the network has {scores.shape[1]} outputs, but there are names of {classes} classes")
    return scores.float().cpu()


def _prediction(path: str | Path, scores: Tensor, classes: Sequence[str], top: int) -> Prediction:
    values, indices = scores.softmax(0).topk(min(top, len(classes)))
    return Prediction(str(path), [(classes[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)])
