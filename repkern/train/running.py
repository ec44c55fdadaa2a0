"""One training from a recipe in a run folder: what `repkern train` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from repkern.models import Network, save
from repkern.models.files import replaced
from repkern.train.accuracy import check_outputs
from repkern.train.build import build_data, build_trainer
from repkern.train.callbacks import Callback
from repkern.train.distributed import Runtime
from repkern.train.recipe import Recipe
from repkern.train.sharded import whole_network
from repkern.train.trainer import Trainer

__all__ = ["MODEL", "run_recipe"]

#: The trained network in the run folder; with a moving average of the weights, that average.
MODEL = "model.safetensors"


def run_recipe(
    recipe: Recipe,
    folder: Path,
    runtime: Runtime,
    *,
    callbacks: Sequence[Callback] = (),
    began: Callable[[Trainer], None] = lambda trainer: None,
) -> dict[str, Any]:
    """Train what `recipe` says in `folder`, continuing what is there, and save the network.

    Every process of `runtime` calls it; rank 0 writes. began: called before the first step. Returns the summary of the
    run as JSON values. Raises what `Trainer.fit` and `repkern.data.open_data` raise.
    """
    start = time.perf_counter()
    data = build_data(recipe)
    trainer = build_trainer(recipe, data, folder=folder, callbacks=callbacks, runtime=runtime)
    check_outputs(trainer.model, data)
    trainer.resume()
    began(trainer)
    rows = trainer.fit()
    trained = whole_network(trainer.model if trainer.average is None else trainer.average.module, trainer.origin)
    if runtime.is_main:
        _save(trained, folder / MODEL)
    tested = [row for row in rows if "test_accuracy" in row]
    best = max(tested, key=lambda row: (row["test_accuracy"], -row["epoch"]))
    return {
        "name": recipe.name,
        "classes": list(data.classes),
        "accuracy": tested[-1]["test_accuracy"],
        "best_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "paper_top1": None if recipe.paper is None else recipe.paper.top1,
        "last": rows[-1],
        "epochs": len(rows),
        "steps": trainer.step,
        "skipped_steps": trainer.skipped,
        "processes": runtime.world,
        "training_seconds": round(sum(row["seconds"] for row in rows), 1),
        "seconds_now": round(time.perf_counter() - start, 1),
        "model": str(folder / MODEL),
        "recipe": recipe.model_dump(mode="json"),
    }


def _save(model: nn.Module, path: Path) -> None:
    """As a file that says itself what it holds, for networks of create_model; else the weights alone."""
    if isinstance(model, Network):
        save(model, path)
        return
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    with replaced(path) as temporary:
        save_file(tensors, str(temporary))
