"""The job of `repkern repopt`: one plain network, trained by SGD, by a RepOptimizer, and with RepVGG's branches."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from repkern.data import DataSource
from repkern.models.files import replaced
from repkern.models.seal import WEIGHTS, sealed
from repkern.nn import reparameterize
from repkern.optim import save_scales
from repkern.search import HyperSearch
from repkern.train.build import build_data, build_model, build_trainer
from repkern.train.callbacks import Callback
from repkern.train.distributed import Runtime
from repkern.train.measure import median_times, paired_times, training_memory, training_step
from repkern.train.optimizers import make_optimizer
from repkern.train.recipe import Recipe
from repkern.train.reproducible import deterministic
from repkern.train.trainer import Trainer

__all__ = ["FORMS", "SCALES", "SEARCH", "RepOptRecipe", "SearchProgress", "form_of", "run_hyper_search", "run_repopt"]

#: What is trained and compared. The first two are the same plain network, apart from its first values.
FORMS = ("sgd", "repopt", "repvgg", "qarepvgg")
#: What runs before them.
SEARCH = "search"
SCALES = "scales.safetensors"

_BLOCKS = {"sgd": "conv_bn", "repopt": "conv_bn", "repvgg": "repvgg", "qarepvgg": "qarepvgg"}
_STEP_ROUNDS = 21
_LATENCY_ROUNDS = 51


class RepOptRecipe(Recipe):
    """A recipe of the trainings, and how long the search before them is."""

    search_epochs: int = Field(12, ge=1, description="epochs of the hyper-search, on the same images")


class SearchProgress(Callback):
    """Keeps a HyperSearch up to date with the training loop, and its history in the checkpoints."""

    name = "hyper_search"

    def __init__(self, search: HyperSearch) -> None:
        self.search = search

    def on_step_end(self, trainer: Trainer) -> None:
        """Counts the step."""
        self.search.step()

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Notes the means of the scales."""
        self.search.epoch_end()

    def state_dict(self) -> dict[str, Any]:
        """That of the search."""
        return self.search.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """That of the search."""
        self.search.load_state_dict(state)


_Callbacks = Callable[[str], Sequence[Callback]]
_Say = Callable[[str], None]


def run_hyper_search(
    recipe: RepOptRecipe,
    data: DataSource,
    folder: Path,
    *,
    callbacks: _Callbacks = lambda name: (),
    runtime: Runtime | None = None,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Search the scales for the network of `recipe`, continuing what is in `folder`/search.

    Writes scales.safetensors there and returns the scales and the rows of the epochs. Raises Interrupted and
    CheckpointError.
    """
    plain = form_of("sgd", recipe)
    plan = plain.model_copy(update={"train": recipe.train.model_copy(update={"epochs": recipe.search_epochs})})
    search = HyperSearch(build_model(plan, data))
    own = [*callbacks(SEARCH), SearchProgress(search)]
    trainer = Trainer(search.model, data, plan, callbacks=own, folder=folder / SEARCH, runtime=runtime)
    trainer.resume()
    rows = trainer.fit()
    scales = {name: scale.cpu() for name, scale in search.scales().items()}
    save_scales(
        scales, folder / SCALES, recipe=recipe.model_dump(mode="json"), search_accuracy=rows[-1]["test_accuracy"]
    )
    return scales, rows


def run_repopt(
    recipe: RepOptRecipe,
    folder: Path,
    *,
    callbacks: _Callbacks = lambda name: (),
    say: _Say = lambda text: None,
    quantize: Callable[[Mapping[str, nn.Module], DataSource], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Search, train all FORMS in `folder`, continuing what is there; deploy, save, quantize and measure.

    callbacks(name): asked for SEARCH and each of FORMS; say: receives one line at the start of each later stage.
    quantize: receives the deployed networks and the data, and what it returns is the summary's "quantized".
    Returns the summary of the run as JSON values. Raises Interrupted, CheckpointError and MissingExtraError.
    """
    from repkern import __version__

    began = time.perf_counter()
    with deterministic(recipe.train.threads or None), Runtime(recipe.train) as runtime:
        data = build_data(recipe)
        _, searched = run_hyper_search(recipe, data, folder, callbacks=callbacks, runtime=runtime)
        models: dict[str, nn.Module] = {}
        rows: dict[str, list[dict[str, Any]]] = {SEARCH: searched}
        for name in FORMS:
            form = form_of(name, recipe, folder)
            trainer = build_trainer(form, data, folder=folder / name, callbacks=callbacks(name), runtime=runtime)
            trainer.resume()
            rows[name] = trainer.fit()
            models[name] = trainer.model.eval()
        batch = next(data.train_batches(0))
        images, labels = batch.images.to(runtime.device), batch.labels.to(runtime.device)
        deployed = _deploy(models, images, folder, say)
        quantized = None
        if quantize is not None:
            say("Quantizing the deployed networks, with INT8 weights and activations")
            quantized = quantize(deployed, data)
        measured = _measure(models, deployed["sgd"], recipe, folder, (images, labels), say)
    return {
        "repkern": __version__,
        "torch": torch.__version__,
        "test_images": sum(len(batch.labels) for batch in data.test_batches()),
        "accuracy": {name: rows[name][-1]["test_accuracy"] for name in (SEARCH, *FORMS)},
        **measured,
        "quantized": quantized,
        "training_seconds": {name: round(sum(row["seconds"] for row in rows[name]), 1) for name in rows},
        "total_seconds": round(time.perf_counter() - began, 1),
        "recipe": recipe.model_dump(mode="json"),
    }


def form_of(name: str, recipe: RepOptRecipe, folder: Path | None = None) -> RepOptRecipe:
    """The recipe of the training called `name` in FORMS; that of "repopt" takes the scales found in `folder`.

    The others have torch's optimizer, also where `recipe` has a RepOptimizer.
    """
    changes: dict[str, Any] = {"model": recipe.model.model_copy(update={"block": _BLOCKS[name]})}
    if name == "repopt":
        assert folder is not None
        scales = {"name": "repsgd", "scales": str(folder / SCALES)}
        changes["optimizer"] = recipe.optimizer.model_copy(update=scales)
    elif recipe.optimizer.scales:
        plain = {"name": recipe.optimizer.name.removeprefix("rep"), "scales": ""}
        changes["optimizer"] = recipe.optimizer.model_copy(update=plain)
    return recipe.model_copy(update=changes)


def _deploy(models: Mapping[str, nn.Module], images: Tensor, folder: Path, say: _Say) -> dict[str, nn.Module]:
    """Every network as plain convolutions, proven to compute the same; that of "repopt" is written to a file."""
    say("Turning all networks into plain convolutions, checking that they still compute the same")
    deployed = {name: reparameterize(model, verify=images) for name, model in models.items()}
    with replaced(folder / "repopt.safetensors") as temporary:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in deployed["repopt"].state_dict().items()}
        save_file(tensors, str(temporary), metadata={WEIGHTS: sealed({}, tensors)})
    return deployed


def _measure(
    models: Mapping[str, nn.Module],
    plain: nn.Module,
    recipe: RepOptRecipe,
    folder: Path,
    batch: tuple[Tensor, Tensor],
    say: _Say,
) -> dict[str, Any]:
    say("Measuring step time and memory, the networks taking turns")
    images, labels = batch
    where = images.device.type
    loss = nn.CrossEntropyLoss(label_smoothing=recipe.loss.label_smoothing)
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    for name in FORMS:
        model = copy.deepcopy(models[name]).train()
        optimizer = make_optimizer(model, form_of(name, recipe, folder))
        steps[name] = training_step(model, optimizer, loss, images, labels)
        peaks[name] = training_memory(model, optimizer, steps[name], where)
    times = paired_times(steps, rounds=_STEP_ROUNDS, device=where)
    with torch.inference_mode():
        latency = paired_times(
            {"deployed": functools.partial(plain, images[:1])}, rounds=_LATENCY_ROUNDS, warmup=10, device=where
        )
    return {
        "parameters": {name: sum(p.numel() for p in models[name].parameters()) for name in FORMS},
        "train_step_seconds": median_times(times),
        "train_peak_bytes": peaks,
        "latency_seconds": median_times(latency),
    }
