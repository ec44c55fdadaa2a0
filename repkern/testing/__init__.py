"""Shared by tests and benchmarks: computed tolerances, comparison, awkward inputs, the targets of this machine."""

from repkern.testing.compare import assert_close, worst_ratio
from repkern.testing.devices import Target, targets
from repkern.testing.inputs import Sample, as_float, noncontiguous, samples_of
from repkern.testing.tolerance import error_bounds, unit_roundoff

__all__ = [
    "Sample",
    "Target",
    "as_float",
    "assert_close",
    "error_bounds",
    "noncontiguous",
    "samples_of",
    "targets",
    "unit_roundoff",
    "worst_ratio",
]
