"""grad_mult_adamw_ on the native kernels."""

from __future__ import annotations

from typing import Any

from repkern.ops._grad_mult import Plan
from repkern.ops._library import Native
from repkern.ops.grad_mult_adamw import reference

__all__ = ["grad_mult_adamw_"]


def grad_mult_adamw_(native: Native, plan: Plan, *args: Any) -> None:
    """The step in plain torch."""
    reference.grad_mult_adamw_(*args)
