"""grad_mult_sgd_ on the native kernels."""

from __future__ import annotations

from typing import Any

from repkern.ops._grad_mult import Plan
from repkern.ops._library import Native
from repkern.ops.grad_mult_sgd import reference

__all__ = ["grad_mult_sgd_"]


def grad_mult_sgd_(native: Native, plan: Plan, *args: Any) -> None:
    """The step in plain torch."""
    reference.grad_mult_sgd_(*args)
