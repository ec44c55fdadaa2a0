"""Augmentation of batches whose parameters are functions of the sample, not of what was drawn before."""

from repkern.data.augment.affine import Affine
from repkern.data.augment.crop import Crop
from repkern.data.augment.erasing import Cutout, Erasing
from repkern.data.augment.flip import Flip
from repkern.data.augment.mix import Mix
from repkern.data.augment.pipeline import Step, build

__all__ = ["Affine", "Crop", "Cutout", "Erasing", "Flip", "Mix", "Step", "build"]
