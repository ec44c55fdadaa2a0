"""The one place that imports kornia."""

from __future__ import annotations

from types import ModuleType

from repkern.data.errors import MissingExtraError

__all__ = ["enhance"]


def enhance() -> ModuleType:
    """kornia.enhance. MissingExtraError without it."""
    try:
        import kornia.enhance
    except ImportError as error:
        raise MissingExtraError(
            f"operations on colors of images need kornia ({error}): pip install 'repkern[train]'"
        ) from None
    return kornia.enhance
