"""RandAugment, AutoAugment and TrivialAugment: operations that each image draws for itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from repkern.data.augment._operations import IDENTITY, Operation, apply_operations
from repkern.data.augment._policies import POLICIES
from repkern.data.augment._sampling import UniformDraws, check_images, draw, integers, normals, signs
from repkern.data.augment._spaces import AUTOAUGMENT, RANDAUGMENT, TRIVIAL_WIDE
from repkern.data.section import Section

__all__ = ["AutoAugment", "RandAugment", "TrivialAugment"]

_MOST = 10  # the magnitude that is a strength of 1
_AUTO_BINS, _TRIVIAL_BINS = 10, 31
_NEEDED = 6  # draws of one round of RandAugment


class _Policy(Section):
    """What the three have in common."""

    fill: float = Field(0.5, ge=0, le=1, description="value of what comes in from outside the image")
    interpolation: Literal["bilinear", "nearest"] = Field("bilinear", description="of what moves pixels")

    def _apply(self, images: Tensor, chosen: list[Operation]) -> Tensor:
        return apply_operations(images, chosen, fill=self.fill, nearest=self.interpolation == "nearest")


class RandAugment(_Policy):
    """`count` operations in a row, each drawn evenly out of a space of them (1909.13719).

    Spaces: "paper" has the 14 operations of the paper, which grow stronger with the magnitude. "timm" are the 15
    "increasing" ones of timm, where the released training of later RepVGGs uses a probability of 0.5, magnitude 9 and
    deviation 0.5. "repvgg" are the 16 that the released training of RepVGG and RepOptimizers calls raug15, with
    magnitude 15 and `below`.
    """

    name: Literal["randaugment"] = "randaugment"
    count: int = Field(2, ge=1, le=16)
    magnitude: float = Field(9.0, ge=0, le=30, description="10 is the strongest, except in the space repvgg")
    deviation: float = Field(0.0, ge=0, description="standard deviation of the magnitude")
    below: bool = Field(False, description="draw a whole magnitude from 0 to below the one given, evenly")
    probability: float = Field(1.0, ge=0, le=1, description="of each operation")
    space: Literal["paper", "timm", "repvgg"] = "paper"

    def __call__(self, images: Tensor, draws: UniformDraws) -> Tensor:
        """Images [N, 1 or 3, H, W] floating in [0, 1], to the same shape. MissingExtraError without kornia."""
        check_images(images, colors=True)
        drawn = draw(images, draws, "randaugment/rounds", _NEEDED * self.count)
        for turn in range(self.count):
            images = self._apply(images, self._round(drawn[:, _NEEDED * turn : _NEEDED * (turn + 1)]))
        return images

    def _round(self, drawn: Tensor) -> list[Operation]:
        space = list(RANDAUGMENT[self.space].items())
        rows = zip(
            integers(drawn[:, 0], len(space)).tolist(),
            drawn[:, 1].tolist(),
            self._magnitudes(drawn[:, 2]),
            signs(drawn[:, 3]).tolist(),
            drawn[:, 4:].tolist(),
            strict=True,
        )
        chosen = []
        for index, apply, magnitude, sign, (down, across) in rows:
            name, level = space[index]
            operation = Operation(name, level(magnitude / _MOST, sign), (down, across))
            chosen.append(operation if apply < self.probability else IDENTITY)
        return chosen

    def _magnitudes(self, uniform: Tensor) -> list[float]:
        most = float("inf") if self.space == "repvgg" else float(_MOST)
        if self.below:
            values = integers(uniform, max(1, int(self.magnitude))).tolist()
        elif self.deviation:
            values = [self.magnitude + self.deviation * value for value in normals(uniform).tolist()]
        else:
            values = [self.magnitude] * len(uniform)
        return [min(max(0.0, value), most) for value in values]


class AutoAugment(_Policy):
    """One of the 25 pairs of operations that were found for ImageNet or CIFAR-10, drawn evenly (1805.09501)."""

    name: Literal["autoaugment"] = "autoaugment"
    policy: Literal["imagenet", "cifar10"] = "imagenet"

    def __call__(self, images: Tensor, draws: UniformDraws) -> Tensor:
        """Images [N, 1 or 3, H, W] floating in [0, 1], to the same shape. MissingExtraError without kornia."""
        check_images(images, colors=True)
        policy = POLICIES[self.policy]
        drawn = draw(images, draws, "autoaugment/pair", 5)
        pairs = [policy[index] for index in integers(drawn[:, 0], len(policy)).tolist()]
        for turn in range(2):
            apply, sign = drawn[:, 1 + turn].tolist(), signs(drawn[:, 3 + turn]).tolist()
            chosen = []
            for index, pair in enumerate(pairs):
                name, probability, magnitude = pair[turn]
                argument = AUTOAUGMENT[name](magnitude / (_AUTO_BINS - 1), sign[index])
                chosen.append(Operation(name, argument) if apply[index] < probability else IDENTITY)
            images = self._apply(images, chosen)
        return images


class TrivialAugment(_Policy):
    """One operation out of 14, with a strength drawn out of 31, from the paper's wide ranges (2103.10158)."""

    name: Literal["trivialaugment"] = "trivialaugment"

    def __call__(self, images: Tensor, draws: UniformDraws) -> Tensor:
        """Images [N, 1 or 3, H, W] floating in [0, 1], to the same shape. MissingExtraError without kornia."""
        check_images(images, colors=True)
        space = list(TRIVIAL_WIDE.items())
        drawn = draw(images, draws, "trivialaugment/operation", 3)
        rows = zip(
            integers(drawn[:, 0], len(space)).tolist(),
            integers(drawn[:, 1], _TRIVIAL_BINS).tolist(),
            signs(drawn[:, 2]).tolist(),
            strict=True,
        )
        chosen = []
        for index, strength, sign in rows:
            name, level = space[index]
            chosen.append(Operation(name, level(strength / (_TRIVIAL_BINS - 1), sign)))
        return self._apply(images, chosen)
