"""The data section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from repkern.data.augment import Mix, Step
from repkern.data.section import Section

__all__ = ["DataRecipe", "HuggingFaceRecipe"]


class HuggingFaceRecipe(Section):
    """How a data set in one of Hugging Face's layouts is read. `data.root` is its folder, parquet file, or name."""

    config: str = Field("", description="which configuration of a data set that has several")
    train_split: str = Field("train", description="name of the training split")
    test_split: str = Field("", description="name of the test split; empty: test, validation, val or valid")
    image_column: str = Field("", description="name; empty for the only column of images")
    label_column: str = Field("", description="name; empty for the only column of class labels")
    streaming: bool = Field(False, description="read rows as they come, for what does not fit on the disk")
    shuffle: int = Field(10_000, ge=1, description="streaming: rows to choose the next one from")


class DataRecipe(Section):
    """Which images, how they are read, and how they are augmented."""

    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "folder", "imagenet", "huggingface"] = Field(
        "digits", description="which data set"
    )
    root: str = Field("", description="where it is; empty for its usual places")
    download: bool = Field(False, description="fetch it when it is not there: fashion_mnist, cifar10, cifar100")
    huggingface: HuggingFaceRecipe = HuggingFaceRecipe()
    classes: int = Field(0, ge=0, description="number of classes that it must have; 0 for any")
    limit: int = Field(0, ge=0, description="train on so many of the images, always the same ones; 0 for all")
    test_limit: int = Field(0, ge=0, description="test on so many of the images, always the same ones; 0 for all")

    image_size: int = Field(0, ge=0, description="side of the images, in pixels; 0 for their own")
    channels: Literal[0, 1, 3] = Field(0, description="1: grey, 3: colour, 0: as the data set is")
    test_crop: float = Field(1.0, gt=0, le=1, description="side of the square in the middle, in shorter sides")
    crop_scale: tuple[float, float] | None = Field(
        None, description="train on random crops with such parts of the area; none for the square in the middle"
    )
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="width over height of random crops")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="of resizing, with antialiasing")
    mean: tuple[float, ...] | None = Field(None, description="of each channel, in [0, 1]; none for the data set's")
    std: tuple[float, ...] | None = Field(None, description="of each channel; none for the data set's")

    augment: tuple[Step, ...] = Field((), description="augmentations of training images, in their order")
    mix: Mix | None = Field(None, description="mixup and CutMix")

    workers: int = Field(0, ge=0, description="processes that read and augment; 0 for the training process")
    test_batch_size: int = Field(0, ge=0, description="images of a test batch, of each process; 0 for batch_size")
    memory: float = Field(1.0, ge=0, description="GiB that decoded images may stay in; larger sets are read each epoch")
    on_error: Literal["skip", "fail"] = Field("skip", description="about images that cannot be read")
    damaged_share: float = Field(0.01, ge=0, le=1, description="skip: part of the images that may be damaged")

    @model_validator(mode="after")
    def _consistent(self) -> DataRecipe:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std must be given together")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must be as long, got {len(self.mean)} and {len(self.std)} values")
        if self.std is not None and any(value <= 0 for value in self.std):
            raise ValueError(f"std must be above 0, got {self.std}")
        if self.crop_scale is not None:
            _check_crop(self.crop_scale, self.crop_ratio, self.image_size)
        if self.name in ("folder", "imagenet", "huggingface") and not self.root:
            raise ValueError(f"root must say where the images of {self.name} are")
        return self


def _check_crop(scale: tuple[float, float], ratio: tuple[float, float], size: int) -> None:
    if not size:
        raise ValueError("crop_scale needs image_size, the size that crops are resized to")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"crop_scale must be two parts of the area, the smaller one first, got {scale}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"crop_ratio must be two ratios, the smaller one first, got {ratio}")
