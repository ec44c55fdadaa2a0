"""Plots."""

from repkern.viz.augmentations import plot_augmentations
from repkern.viz.curves import plot_curves
from repkern.viz.kernels import plot_kernels
from repkern.viz.sensitivity import plot_sensitivity

__all__ = ["plot_augmentations", "plot_curves", "plot_kernels", "plot_sensitivity"]
