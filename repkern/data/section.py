"""What every section of a recipe is made of: checked, immutable, and written as JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Section"]


class Section(BaseModel):
    """A pydantic model that refuses unknown fields, values of another kind, NaN and infinity, and later changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, str_strip_whitespace=True
    )
