"""Deployed networks with random weights whose norms have seen data, and images that they tell apart."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from repkern.models import create_model
from repkern.models.network import Network
from repkern.nn.reparameterize import reparameterize

__all__ = ["calibrated", "random_images"]

# At least so many images, and so many pixels of the last map (32 times smaller than the image) in all.
_FEWEST_IMAGES, _FEWEST_PIXELS = 8, 256


def calibrated(name: str, *, size: int = 224, width: float = 1.0, seed: int = 0) -> Network:
    """Network `name` of `create_model`, reparameterized, in eval mode: 3x3 convolutions with a bias and ReLUs.

    Its random training form has seen random images of size x size in train mode, so that every norm has their
    statistics and activations keep their scale from layer to layer; scales and shifts of the norms are random.
    """
    count = max(_FEWEST_IMAGES, _FEWEST_PIXELS // max(1, size // 32) ** 2)
    before = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = create_model(name, width=width)
    finally:
        torch.random.set_rng_state(before)
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average of what was seen, not of that and the initial values
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    with torch.no_grad():
        model.train()(random_images(count, size, seed=seed + 2))
    return cast(Network, reparameterize(model.eval()))


def random_images(count: int, size: int, *, seed: int = 0) -> Tensor:
    """[count, 3, size, size] float32, unit scale: noise at every resolution from one pixel to the whole image.

    White noise alone looks the same to a network whatever the seed; with coarse structure images differ.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator)
    parts, cells = 1, 1
    while cells < size:
        coarse = torch.randn(count, 3, cells, cells, generator=generator)
        images += nn.functional.interpolate(coarse, size=(size, size), mode="nearest")
        parts, cells = parts + 1, 4 * cells
    return images / parts**0.5
