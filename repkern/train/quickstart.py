"""The main job: digits, learned by a plain and by an OREPA network of the same shape, then deployed and compared."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repkern.data import DataSource
from repkern.models.digits import DigitsNet, save_digits_net
from repkern.nn import reparameterize
from repkern.train.build import build_data, build_trainer
from repkern.train.callbacks import Callback
from repkern.train.distributed import Runtime
from repkern.train.measure import median_times, paired_times, training_memory, training_step
from repkern.train.optimizers import make_optimizer
from repkern.train.recipe import Recipe, ReplaceRecipe
from repkern.train.reproducible import deterministic

__all__ = ["FORMS", "form_of", "run_quickstart", "whole_test_set"]

FORMS = ("plain", "orepa")

_STEP_ROUNDS = 21
_LATENCY_ROUNDS = 101


def run_quickstart(
    recipe: Recipe,
    folder: Path,
    *,
    callbacks: Callable[[str], Sequence[Callback]] = lambda name: (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train both networks in `folder`, continuing what is there; deploy, save plain.safetensors, measure.

    `callbacks(name)` is asked for each of FORMS; `say` receives one line at the start of each later stage. Returns
    the summary of the run as JSON values. Raises Interrupted, CheckpointError and MissingExtraError.
    """
    began = time.perf_counter()
    with deterministic(recipe.train.threads or None), Runtime(recipe.train) as runtime:
        data = build_data(recipe)
        models: dict[str, nn.Module] = {}
        rows: dict[str, list[dict[str, Any]]] = {}
        for name in FORMS:
            form = form_of(name, recipe)
            trainer = build_trainer(form, data, folder=folder / name, callbacks=callbacks(name), runtime=runtime)
            trainer.resume()
            rows[name] = trainer.fit()
            models[name] = trainer.model.eval()
        summary = _deploy(models, recipe, data, runtime.device, folder, say)
        summary.update(_measure(models, recipe, data, runtime.device, say))
    summary["accuracy"] = {**{name: rows[name][-1]["test_accuracy"] for name in FORMS}, **summary["accuracy"]}
    summary["training_seconds"] = {name: round(sum(row["seconds"] for row in rows[name]), 1) for name in FORMS}
    summary["total_seconds"] = round(time.perf_counter() - began, 1)
    summary["recipe"] = recipe.model_dump(mode="json")
    return summary


def form_of(name: str, recipe: Recipe) -> Recipe:
    """The recipe of the network called `name` in FORMS: the same but for its convolutions."""
    replace = None if name == "plain" else ReplaceRecipe(block="OREPAConv2d")
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"replace": replace})})


def whole_test_set(data: DataSource, device: torch.device) -> tuple[Tensor, Tensor]:
    """The whole test set as one batch on `device`."""
    batches = list(data.test_batches())
    return torch.cat([b.images for b in batches]).to(device), torch.cat([b.labels for b in batches]).to(device)


def _deploy(
    models: dict[str, nn.Module],
    recipe: Recipe,
    data: DataSource,
    device: torch.device,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Add the deployed network to `models`, save it, and say how far it is from the one that was trained."""
    from repkern import __version__

    say("Reparameterizing the OREPA network, checking that it still computes the same")
    images, labels = whole_test_set(data, device)
    deployed = reparameterize(models["orepa"], verify=images)
    assert isinstance(deployed, DigitsNet)
    models["deployed"] = deployed
    with torch.no_grad():
        trained_logits, deployed_logits = models["orepa"](images), deployed(images)
    accuracy = int((deployed_logits.argmax(1) == labels).sum()) / len(labels)
    save_digits_net(
        deployed,
        folder / "plain.safetensors",
        test_accuracy=accuracy,
        repkern=__version__,
        recipe=recipe.model_dump(mode="json"),
    )
    return {
        "repkern": __version__,
        "torch": torch.__version__,
        "test_images": len(labels),
        "accuracy": {"deployed": accuracy},
        "max_difference": (trained_logits - deployed_logits).abs().max().item(),
        "largest_output": deployed_logits.abs().max().item(),
    }


def _measure(
    models: dict[str, nn.Module], recipe: Recipe, data: DataSource, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    say("Measuring step time, memory and latency, the networks taking turns")
    images, labels = next(data.train_batches(0))
    images, labels, where = images.to(device), labels.to(device), device.type
    loss = nn.CrossEntropyLoss(label_smoothing=recipe.loss.label_smoothing)
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    for name in FORMS:
        model = copy.deepcopy(models[name]).train()
        optimizer = make_optimizer(model, recipe)
        steps[name] = training_step(model, optimizer, loss, images, labels)
        peaks[name] = training_memory(model, optimizer, steps[name], where)
    times = paired_times(steps, rounds=_STEP_ROUNDS, device=where)
    one = images[:1]
    with torch.inference_mode():
        latency = paired_times(
            {name: functools.partial(model, one) for name, model in models.items()},
            rounds=_LATENCY_ROUNDS,
            warmup=10,
            device=where,
        )
    return {
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()},
        "train_step_seconds": median_times(times),
        "train_peak_bytes": peaks,
        "latency_seconds": median_times(latency),
    }
