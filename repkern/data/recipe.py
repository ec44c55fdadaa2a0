"""The data section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from repkern.data.section import Section

__all__ = ["DataRecipe"]


class DataRecipe(Section):
    """Which images, how they are read, and how they are augmented."""

    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "folder", "imagenet", "huggingface"] = Field(
        "digits", description="which data set"
    )
    root: str = Field("", description="where it is; empty for its usual places")
    image_size: int = Field(0, ge=0, description="side of the images, in pixels; 0 for their own")
    workers: int = Field(0, ge=0, description="processes that read and augment")
