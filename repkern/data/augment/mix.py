"""Mixup (1710.09412) and CutMix (1905.04899): two images and their labels made into one."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from repkern.data.augment._beta import symmetric_beta
from repkern.data.augment._sampling import UniformDraws, check_images, column, draw
from repkern.data.augment.erasing import Box, box_mask
from repkern.data.batch import Batch
from repkern.data.section import Section

__all__ = ["Mix"]

_HALF_STEP = 2.0**-25  # draws are multiples of 2**-24; weights of exactly 0 have no logarithm


class Mix(Section):
    """Each image mixed with the one at the mirrored place of its batch (or piece of a batch), the last with the first.

    Mixup adds them with weights w and 1 - w, CutMix puts a rectangle of 1 - w of the area of the other in; w is drawn
    from Beta(alpha, alpha). With both, `switch` chooses. One draw serves the whole batch, as in the papers' training;
    it is that of its first sample. With `each` "sample" every image has its own.

    Labels are never smoothed here: the smoothing of the loss applies to mixed labels as well, which is the same as
    mixing smoothed ones.
    """

    mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0 for no mixup")
    cutmix: float = Field(0.0, ge=0, description="alpha of CutMix; 0 for no CutMix")
    probability: float = Field(1.0, ge=0, le=1, description="of mixing at all")
    switch: float = Field(0.5, ge=0, le=1, description="with both: probability of CutMix")
    each: Literal["batch", "sample"] = Field("batch", description="what has one draw")

    @model_validator(mode="after")
    def _mixes(self) -> Mix:
        if not self.mixup and not self.cutmix:
            raise ValueError("mixup or cutmix must be above 0, got 0 for both")
        return self

    def __call__(self, batch: Batch, draws: UniformDraws, classes: int) -> Batch:
        """Images [N, C, H, W] of any C, and labels [N, classes] that sum to 1, float32 or as precise as the images.

        Labels come as [N] int64 or as [N, classes] floating. ValueError for labels that do not fit, or draws of another
        number of samples.
        """
        check_images(batch.images)
        labels = _soft(batch, classes)
        if len(labels) == 0:
            return Batch(batch.images, labels)
        mixed, weights = self._mix_images(batch.images, draws)
        share = weights.to(labels.device, labels.dtype)[:, None]
        return Batch(mixed, labels * share + labels.flip(0) * (1 - share))

    def _mix_images(self, images: Tensor, draws: UniformDraws) -> tuple[Tensor, Tensor]:
        """The mixed images, and the share [N] float64 of the first of each two."""
        drawn = draw(images, draws, "mix/parameters", 5).tolist()
        count = len(images) if self.each == "sample" else 1
        plans = [self._plan(values, images.shape[2], images.shape[3]) for values in drawn[:count]]
        if count == 1:
            plans *= len(images)
        weights = torch.tensor([weight for weight, _ in plans], dtype=torch.float64)
        boxes = [box for _, box in plans]
        is_cut = torch.tensor([box is not None for box in boxes])
        others = images.flip(0)
        share = column(weights, images)
        blended = images * share + others * (1 - share)
        if not is_cut.any():
            return blended, weights
        pasted = torch.where(box_mask([box or (0, 0, 0, 0) for box in boxes], images), others, images)
        return torch.where(column(is_cut, images), pasted, blended), weights

    def _plan(self, drawn: list[float], height: int, width: int) -> tuple[float, Box | None]:
        """The weight of the first image, and for CutMix the box of the second."""
        apply, switch, uniform, down, across = drawn
        if apply >= self.probability:
            return 1.0, None
        cuts = self.cutmix > 0 and (not self.mixup or switch < self.switch)
        weight = symmetric_beta(self.cutmix if cuts else self.mixup, uniform + _HALF_STEP)
        if not cuts:
            return weight, None
        side = math.sqrt(1 - weight)
        tall, wide = int(height * side), int(width * side)
        top, left = int(down * height) - tall // 2, int(across * width) - wide // 2
        box = max(top, 0), min(top + tall, height), max(left, 0), min(left + wide, width)
        return 1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width), box


def _soft(batch: Batch, classes: int) -> Tensor:
    labels, count = batch.labels, len(batch.images)
    if labels.is_floating_point():
        if labels.shape != (count, classes):
            raise ValueError(f"soft labels must be [{count}, {classes}], got {list(labels.shape)}")
        return labels
    if labels.shape != (count,):
        raise ValueError(f"labels must be [{count}], got {list(labels.shape)}")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    return functional.one_hot(labels.long(), classes).to(torch.promote_types(batch.images.dtype, torch.float32))
