"""From the data section of a recipe to the source of a run."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from repkern.data.augment import Step, build
from repkern.data.cifar import open_cifar
from repkern.data.damages import Damages
from repkern.data.digits import open_digits
from repkern.data.draws import Draws, epoch_order
from repkern.data.folders import FileData, open_folder
from repkern.data.framing import Framing
from repkern.data.huggingface import RowData, StreamData, open_huggingface
from repkern.data.idx import open_fashion_mnist
from repkern.data.reading import Damage, Part
from repkern.data.recipe import DataRecipe
from repkern.data.sets import ImageSet, MemoryData
from repkern.data.source import ImageSource

__all__ = ["open_data", "statistics_of"]

_LIMIT_SEED = 2022  # which images a limit leaves is part of the task, not of a run
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Mean and standard deviation of the training images' channels.
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.5,), (0.5,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# What changes no batch, or is looked at in the data itself.
_NOT_DESCRIBED = {"root", "download", "workers", "test_batch_size", "memory", "huggingface", "on_error"}

_Pair = tuple[ImageSet | StreamData, ImageSet | StreamData]


def open_data(recipe: DataRecipe, *, batch_size: int, seed: int) -> ImageSource:
    """The images that a recipe names, as batches of `batch_size` in an order of `seed`.

    FileNotFoundError and OSError for data that is not there; ValueError, which DamagedImagesError is, for what does not
    fit; MissingExtraError for libraries that are not installed.
    """
    train, test = _limited(recipe, _open(recipe))
    if recipe.classes and len(train.classes) != recipe.classes:
        raise ValueError(
            f"{recipe.root or recipe.name} has {len(train.classes)} classes, the recipe wants {recipe.classes}"
        )
    framing = _framing(recipe, train)
    if isinstance(train, (FileData, RowData)) and isinstance(test, (FileData, RowData)):
        train, test = _decoded(recipe, framing, train, test)
    mean, std = statistics_of(recipe, framing.channels)
    mix = recipe.mix
    classes = len(train.classes)
    return ImageSource(
        train,
        test,
        batch_size=batch_size,
        seed=seed,
        framing=framing,
        mean=mean,
        std=std,
        augment=_Steps(recipe.augment) if recipe.augment else None,
        mix=functools.partial(mix, classes=classes) if mix is not None else None,
        workers=recipe.workers,
        test_batch_size=recipe.test_batch_size,
        on_error=recipe.on_error,
        damaged_share=recipe.damaged_share,
        name=recipe.root or recipe.name,
        options=recipe.model_dump(mode="json", exclude=_NOT_DESCRIBED),
    )


class _Steps:
    """The augmentations of a recipe; unlike the function that is made of them, it can be sent to another process."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self._steps = steps

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        return build(self._steps)(images, draws)


def _open(recipe: DataRecipe) -> _Pair:
    root = os.path.expanduser(recipe.root)
    if recipe.name == "digits":
        return open_digits()
    if recipe.name == "fashion_mnist":
        return open_fashion_mnist(root, fetch=recipe.download)
    if recipe.name in ("cifar10", "cifar100"):
        return open_cifar(int(recipe.name.removeprefix("cifar")), root, fetch=recipe.download)
    if recipe.name in ("folder", "imagenet"):
        return open_folder(root)
    options = recipe.huggingface.model_dump()
    return open_huggingface(root, **options, lengths=(recipe.limit, recipe.test_limit))


def _limited(recipe: DataRecipe, pair: _Pair) -> _Pair:
    """The first images of an order that never changes: a smaller limit takes some of those of a larger one."""
    found = []
    for name, images, limit in zip(("limit", "test_limit"), pair, (recipe.limit, recipe.test_limit), strict=True):
        if limit > len(images):
            raise ValueError(f"{name} must be at most the number of images, {len(images)}, got {limit}")
        if limit and not isinstance(images, StreamData):
            images = images.take(epoch_order(_LIMIT_SEED, 0, len(images))[:limit].sort().values)
        found.append(images)
    return found[0], found[1]


def _framing(recipe: DataRecipe, train: ImageSet | StreamData) -> Framing:
    return Framing(
        size=recipe.image_size,
        channels=recipe.channels or train.channels,
        test_crop=recipe.test_crop,
        crop_scale=recipe.crop_scale,
        crop_ratio=recipe.crop_ratio,
        interpolation=recipe.interpolation,
    )


def statistics_of(recipe: DataRecipe, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel that images are normalized with."""
    if recipe.mean is not None and recipe.std is not None:
        return recipe.mean, recipe.std
    mean, std = _STATISTICS.get(recipe.name, _IMAGENET)
    if len(mean) == channels:
        return mean, std
    if channels == 3:
        return mean * 3, std * 3
    return (sum(mean) / 3,), (sum(std) / 3,)


def _decoded(recipe: DataRecipe, framing: Framing, train: Any, test: Any) -> tuple[Any, Any]:
    """Sets in memory where all images are used whole and fit; otherwise those given.

    A damaged image is left out, as everything is read before the first epoch.
    """
    total = (len(train) + len(test)) * framing.channels * framing.size**2
    if not framing.size or framing.crop_scale is not None or total > recipe.memory * 2**30:
        return train, test
    damages = Damages({"train": len(train), "test": len(test)}, recipe.on_error, recipe.damaged_share)
    return _in_memory("train", train, framing, damages), _in_memory("test", test, framing, damages)


def _in_memory(part: Part, images: FileData | RowData, framing: Framing, damages: Damages) -> MemoryData:
    pixels = torch.empty(len(images), framing.channels, framing.size, framing.size, dtype=torch.uint8)
    whole = torch.ones(len(images), dtype=torch.bool)
    for number, found in enumerate(_read_all(images, framing)):
        if isinstance(found, Tensor):
            pixels[number] = found
        else:
            whole[number] = False
            damages.add([Damage(part, number, f"{images.name_of(number)}: {found}")])
    damages.say(part, instead="they are left out")
    kept = torch.nonzero(whole).flatten()
    if len(kept) < len(images):
        pixels = pixels[kept]
    about = {**images.describe(), "images": len(kept)}
    return MemoryData(pixels, images.labels[kept], images.classes, about=about)


def _read_all(images: FileData | RowData, framing: Framing) -> Iterator[Tensor | Exception]:
    """Every image in order. Pillow decodes outside of Python's lock, so threads do."""

    def read(number: int) -> Tensor | Exception:
        try:
            with images.open(number) as image:
                return framing.read(image)
        except (ImportError, MemoryError):
            raise
        except Exception as problem:  # besides OSError, what each decoder raises about a damaged file
            return problem

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        numbers = iter(range(len(images)))
        while chunk := list(islice(numbers, 1024)):
            yield from pool.map(read, chunk)
