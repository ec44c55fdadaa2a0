"""Augmentations one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from repkern.data.augment._sampling import UniformDraws, stream_number
from repkern.data.augment.affine import Affine
from repkern.data.augment.crop import Crop
from repkern.data.augment.erasing import Cutout, Erasing
from repkern.data.augment.flip import Flip
from repkern.data.augment.jitter import Grayscale, Jitter, Lighting
from repkern.data.augment.policies import AutoAugment, RandAugment, TrivialAugment

__all__ = ["Step", "build"]

Step = Annotated[
    Flip
    | Crop
    | Affine
    | Erasing
    | Cutout
    | Jitter
    | Lighting
    | Grayscale
    | RandAugment
    | AutoAugment
    | TrivialAugment,
    Field(discriminator="name"),
]


class _Again:
    """The draws of the second, third, ... step of a kind: other streams than those of the first."""

    def __init__(self, draws: UniformDraws, turn: int) -> None:
        self._draws = draws
        self._turn = turn

    def uniform(self, stream: int, count: int = 1) -> Tensor:
        return self._draws.uniform(stream_number(f"{stream}/{self._turn}"), count)


def build(steps: Sequence[Step]) -> Callable[[Tensor, UniformDraws], Tensor]:
    """A function from images [N, C, H, W] floating in [0, 1], and the draws of their samples, to augmented ones.

    A step draws from streams of its own, which depend on its name and on how many of that name come before: another
    step, wherever it is put in, changes no one else's draws. The result of a sample depends on nothing but the sample
    and its draws, to the bit: neither on the rest of its batch nor on the number of threads. TypeError for what is no
    step.
    """
    before: Counter[str] = Counter()
    numbered = []
    for step in steps:
        if not callable(step) or not hasattr(step, "name"):
            raise TypeError(f"steps must be sections such as Flip(), got {step!r}")
        numbered.append((step, before[step.name]))
        before[step.name] += 1

    def augment(images: Tensor, draws: UniformDraws) -> Tensor:
        for step, turn in numbered:
            images = step(images, _Again(draws, turn) if turn else draws)
        return images

    return augment
