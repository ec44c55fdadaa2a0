"""Errors that many readers share."""

__all__ = ["MissingExtraError"]


class MissingExtraError(ImportError):
    """A library of an optional extra is not installed; the text says how to get it."""
