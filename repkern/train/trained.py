"""Networks that were trained: out of a run folder, with what is needed to use them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError
from torch import nn

from repkern.models.structure import apply_changes
from repkern.train.build import build_model
from repkern.train.checkpoint import CheckpointError
from repkern.train.preview import KNOWN_DATA, DataOutline
from repkern.train.recipe import Recipe
from repkern.train.run_checkpoints import RunCheckpoint, read_run

__all__ = ["TrainedNetwork", "load_trained"]


@dataclass(frozen=True)
class TrainedNetwork:
    """A network in eval mode on the CPU, in training form, and how it was trained.

    classes: their names. image_size: side of the images, 0 where images had any. metrics: those of the epoch, {} for a
    checkpoint inside an epoch.
    """

    model: nn.Module
    recipe: Recipe
    classes: Sequence[str]
    channels: int
    image_size: int
    step: int
    metrics: Mapping[str, Any]


def load_trained(path: str | Path, which: Literal["best", "last"] = "best") -> TrainedNetwork:
    """The network of a run folder or of one of its checkpoints; the moving average of the weights where there is one.

    which: of a run folder, the checkpoint with the best test accuracy (the newest when none was tested) or the newest.
    CheckpointError for a folder without checkpoints, for damaged and foreign ones, and for the run of a `Trainer` whose
    network was made in Python: `repkern.train.start.start_from` loads it into that network.
    """
    found = read_run(Path(path), which)
    state = found.checkpoint.state
    try:
        if "model" not in state["recipe"]:
            raise CheckpointError(
                f"{found.path} does not say of which network it is, because that was made in Python: make it again, "
                "and load this folder into it with repkern.train.start.start_from(network, folder)"
            )
        recipe = Recipe.model_validate_json(json.dumps(state["recipe"]))
        data = _outline(state["data"], recipe)
        model = _network(recipe, data, found)
        rows = [row for row in state["rows"] if row["step"] == found.step]
    except CheckpointError:
        raise
    except ValidationError as error:
        raise CheckpointError(f"{found.path} was trained without a whole recipe: {error}") from None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{found.path} does not hold a network that can be built: {error}") from error
    metrics = {name: value for name, value in (rows[-1] if rows else {}).items() if name.startswith("test_")}
    return TrainedNetwork(model.eval(), recipe, data.classes, data.channels, data.image_size, found.step, metrics)


def _outline(described: Mapping[str, Any], recipe: Recipe) -> DataOutline:
    _, channels, size = KNOWN_DATA.get(recipe.data.name, (0, 3, 0))
    classes = tuple(map(str, described["train"]["classes"]))
    return DataOutline(classes, int(described["channels"]) or channels, int(described["size"]) or size)


def _network(recipe: Recipe, data: DataOutline, found: RunCheckpoint) -> nn.Module:
    # Its first weights do not matter, so that files the run began with may be gone.
    bare = recipe.model_copy(update={"model": recipe.model.model_copy(update={"checkpoint": ""})})
    model = build_model(bare, cast(Any, data))
    apply_changes(model, found.checkpoint.structure["changes"])
    model.load_state_dict(found.weights, strict=True)
    return model
