"""Augmentation of batches whose parameters are functions of the sample, not of what was drawn before."""

from repkern.data.augment.affine import Affine
from repkern.data.augment.crop import Crop
from repkern.data.augment.erasing import Cutout, Erasing
from repkern.data.augment.flip import Flip
from repkern.data.augment.jitter import Grayscale, Jitter, Lighting
from repkern.data.augment.mix import Mix
from repkern.data.augment.pipeline import Step, build
from repkern.data.augment.policies import AutoAugment, RandAugment, TrivialAugment

__all__ = [
    "Affine", "AutoAugment", "Crop", "Cutout", "Erasing", "Flip", "Grayscale", "Jitter", "Lighting", "Mix",
    "RandAugment", "Step", "TrivialAugment", "build",
]  # fmt: skip
