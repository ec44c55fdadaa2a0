"""What `eval` and `predict` share: a network from a run folder or from any checkpoint file that repkern reads."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from repkern.cli._console import WRONG_USE, fail

if TYPE_CHECKING:
    from torch import nn

    from repkern.train.recipe import Recipe
    from repkern.train.trained import TrainedNetwork

__all__ = ["ModelName", "RecipeOption", "Which", "changed", "open_trained", "prepared"]

ModelName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--model", metavar="NAME", help="The network in a file that does not say it: `repkern models`."),
]
RecipeOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--recipe", metavar="RECIPE", help="Whose images: a name or file.", show_default="that of the run"),
]
Which = Annotated[
    Literal["best", "last"], typer.Option("--which", help="Of a run: its best checkpoint, or its newest.")
]


def open_trained(
    path: Path, *, model: str | None, block: str | None, recipe: str | None, which: Literal["best", "last"]
) -> TrainedNetwork:
    """The network in a run folder, a checkpoint folder or a file; leaves with 2 for wrong use.

    A file has no class names: their numbers stand for them. Its recipe is the one given, else image folders as
    ImageNet is read. Errors as `load_trained` and `repkern.deploy.opening.open_model`.
    """
    from repkern.train.run_checkpoints import is_run
    from repkern.train.trained import load_trained

    if not path.exists():
        fail(f"there is no {path}: give a run folder of `repkern train`, or a file of weights", WRONG_USE)
    if path.is_dir():
        if model is not None or block is not None:
            fail("--model and --block are for files; a run knows its network", WRONG_USE)
        if not is_run(path):
            fail(f"{path} is not a run: it has no checkpoints of a training", WRONG_USE)
        found = load_trained(path, which)
        return found if recipe is None else _with_recipe(found, _recipe(recipe))
    return _from_file(path, model, block, None if recipe is None else _recipe(recipe))


def _recipe(name: str) -> Recipe:
    from repkern.train.recipe_files import RecipeError, load_recipe

    try:
        return load_recipe(name)
    except RecipeError as problem:
        fail(str(problem), WRONG_USE)


def _with_recipe(found: TrainedNetwork, recipe: Recipe) -> TrainedNetwork:
    import dataclasses

    return dataclasses.replace(found, recipe=recipe, image_size=recipe.data.image_size or found.image_size)


def _from_file(path: Path, model: str | None, block: str | None, recipe: Recipe | None) -> TrainedNetwork:
    from repkern.data import DataRecipe
    from repkern.train.preview import KNOWN_DATA
    from repkern.train.recipe import Recipe
    from repkern.train.trained import TrainedNetwork

    network, usual = _network(path, model, block)
    if recipe is None:
        recipe = Recipe(data=DataRecipe(name="folder", root=".", image_size=usual, test_crop=0.875))
    _, _, size = KNOWN_DATA.get(recipe.data.name, (0, 0, 0))
    classes, channels = _shape(network)
    names = tuple(str(number) for number in range(classes))
    return TrainedNetwork(network.eval(), recipe, names, channels, recipe.data.image_size or size, 0, {})


def _network(path: Path, model: str | None, block: str | None) -> tuple[nn.Module, int]:
    from repkern.deploy.opening import open_model, usual_image_size
    from repkern.models.digits import load_digits_net
    from repkern.models.saving import read_description
    from repkern.train.run_checkpoints import is_run

    if model is None and read_description(path) is None:
        with contextlib.suppress(ValueError):
            if path.suffix == ".safetensors":
                return load_digits_net(path), 8
        if is_run(path.parent):
            fail(f"{path} holds weights without their network: give its run, {path.parent}", WRONG_USE)
        fail(
            f"{path} does not say which network it holds: add --model NAME; `repkern models` lists the names", WRONG_USE
        )
    opened = open_model(path, model=model, block=block)
    return opened.model, usual_image_size(opened.model)


def _shape(network: nn.Module) -> tuple[int, int]:
    """(classes, channels of images), from the arguments the network was made with."""
    options = getattr(network, "config", None) or getattr(network, "arguments", {})
    return int(options["num_classes"]), int(options["in_chans"])


def changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """`recipe` with --set on top; leaves with 2 for what cannot be."""
    from repkern.train.recipe_files import RecipeError, recipe_from_text

    try:
        return recipe_from_text(recipe.to_json(), recipe.name, changes)
    except RecipeError as problem:
        fail(str(problem), WRONG_USE)


def prepared(recipe: Recipe, data: str | None) -> Recipe:
    """The recipe for testing alone: with the folder given, and without what only training needs of the images."""
    settings: dict[str, object] = {"test_batch_size": recipe.data.test_batch_size or recipe.train.batch_size}
    if data is not None:
        settings["root"] = data
        if recipe.data.name == "digits":
            settings |= {"name": "folder", "image_size": recipe.data.image_size or 8, "channels": 1}
    described = recipe.data.model_copy(update=settings)
    return recipe.model_copy(update={"data": described, "train": recipe.train.model_copy(update={"batch_size": 1})})
