"""A mean over samples that torchmetrics sums over processes. Imports torchmetrics, so it is imported in functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["SampleMean"]


class SampleMean(Metric):
    """The mean of a value over all samples, in float64; NaN without a sample, and where a value is.

    Not torchmetrics' MeanMetric: without its search for NaN it takes every weight for 1.
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "samples"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: Tensor, samples: int) -> None:
        """`value` is the mean over this many samples."""
        self.total += value.double() * samples
        self.samples += samples

    def compute(self) -> Tensor:
        """A float64 scalar."""
        return self.total / self.samples
