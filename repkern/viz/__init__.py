"""Plots."""

from repkern.viz.curves import plot_curves

__all__ = ["plot_curves"]
