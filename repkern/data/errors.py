"""What can go wrong with data, besides ValueError and OSError."""

from __future__ import annotations

__all__ = ["DamagedImagesError", "DamagedImagesWarning", "DataWorkerError", "ImageSizeError", "MissingExtraError"]


class MissingExtraError(ImportError):
    """A library of an optional extra is not installed; the text says how to get it."""


class DamagedImagesError(ValueError):
    """More images than allowed are missing or cannot be read; the text names the first ones."""


class DamagedImagesWarning(UserWarning):
    """Some images are missing or cannot be read, and others took their places; the text names the first ones."""


class DataWorkerError(RuntimeError):
    """A process that reads images ended. What was trained so far is not affected."""


class ImageSizeError(ValueError):
    """Images of one batch have different sizes; the text names two."""
