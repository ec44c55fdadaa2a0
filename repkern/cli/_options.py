"""Options that several commands share, and what they say about values that cannot be."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from repkern.cli._console import WRONG_USE, fail

if TYPE_CHECKING:
    from repkern.train.recipe import Recipe

__all__ = [
    "TRAINING",
    "Changes",
    "Data",
    "DataFolder",
    "Device",
    "DeviceOption",
    "Fresh",
    "Model",
    "Number",
    "Resume",
    "Seed",
    "Size",
    "Threads",
    "check_extras",
    "check_model",
    "chosen_device",
    "chosen_mode",
    "images_and_network",
    "images_of",
    "network_of",
    "whole_path",
]


class Device(str, Enum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


# Optional[...] because typer evaluates the annotations, and Python 3.10 with `from __future__` is fine with either.
Number = Optional[int]  # noqa: UP045
Folder = Optional[Path]  # noqa: UP045
Data = Annotated[
    Folder,
    typer.Option(
        metavar="FOLDER",
        exists=True,
        file_okay=False,
        help="Images to use: FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png.",
        show_default="scikit-learn's digits",
    ),
]
DataFolder = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--data", metavar="DIR", help="Where the images are, for --set data.root=DIR.", show_default="the recipe's"
    ),
]
Changes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Change a field: optimizer.lr=0.05. As often as needed."),
]
Model = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME", help="A network of `repkern models`, made of 3x3 layers.", show_default="a small VGG"),
]
Size = Annotated[Number, typer.Option(min=8, help="Side that those images get.", show_default="32")]
DeviceOption = Annotated[Device, typer.Option(help="auto: the GPU when there is one.")]
Seed = Annotated[
    Number,
    typer.Option(
        min=0, max=2**32 - 1, help="Seed of weights, order and augmentation.", show_default="that of the recipe, 0"
    ),
]
Threads = Annotated[
    Number, typer.Option(min=1, help="CPU threads; results repeat for the same number.", show_default="all cores")
]
Resume = Annotated[bool, typer.Option("--resume", help="Only continue the newest unfinished run.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start a new run in any case.")]


def whole_path(data: str) -> str:
    """A folder or file as a path that means the same from elsewhere; a name of a data set stays as it is."""
    return str(Path(data).absolute()) if Path(data).exists() else data


def chosen_mode(resume: bool, fresh: bool) -> Literal["auto", "resume", "fresh"]:
    """The mode of `open_run`. Leaves with 2 for options that contradict."""
    if resume and fresh:
        fail("--resume and --fresh contradict each other", WRONG_USE)
    return "resume" if resume else "fresh" if fresh else "auto"


def chosen_device(device: Device) -> Literal["cpu", "cuda"]:
    """Where to train. Leaves with 2 for a GPU that is not there."""
    import torch

    gpu = torch.cuda.is_available()
    if device is Device.cuda and not gpu:
        fail("device cuda: no CUDA GPU or driver was found; --device cpu works everywhere", WRONG_USE)
    if device is Device.auto:
        return "cuda" if gpu else "cpu"
    return "cuda" if device is Device.cuda else "cpu"


#: What every training, and all that reads its recipes, needs of `pip install 'repkern[train]'`.
TRAINING = {"accelerate": "Accelerate", "torchmetrics": "torchmetrics", "yaml": "PyYAML"}


def check_extras(command: str, needed: Mapping[str, str], extra: str) -> None:
    """Leave with 1 when a module of `needed` (module -> name of its package) is not installed."""
    missing = [shown for name, shown in needed.items() if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{command} needs {' and '.join(missing)}: pip install 'repkern[{extra}]'")


def images_and_network(data: Path | None, image_size: int | None, model: str | None) -> dict[str, Any]:
    """The settings of a recipe that those options stand for; None leaves the recipe's own."""
    settings: dict[str, Any] = {}
    if data is not None:
        settings = {"data.name": "folder", "data.root": str(data.absolute()), "data.image_size": image_size or 32}
        settings["data.augment"] = [{"name": "affine"}, {"name": "flip"}]
    elif image_size is not None:
        fail("--image-size is for --data: the digits have a size of their own", WRONG_USE)
    if model is not None:
        settings |= {"model.name": model, "model.options": {}}
    return settings


def network_of(recipe: Recipe) -> str:
    """Its network in words."""
    return "a small VGG" if recipe.model.name == "small_vgg" else recipe.model.name


def images_of(recipe: Recipe) -> str:
    """Its images in words."""
    return "scanned 8x8 digits" if recipe.data.name == "digits" else recipe.data.root or recipe.data.name


def check_model(name: str | None) -> None:
    """Leave with 2 for a network that does not exist."""
    from repkern.models import default_block

    if name is not None:
        try:
            default_block(name)
        except ValueError as problem:
            fail(str(problem), WRONG_USE)
