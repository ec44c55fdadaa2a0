"""The main job: digits, learned by a plain and by an OREPA network of the same shape, then deployed and compared."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repkern.models.digits import DigitsNet, save_digits_net
from repkern.nn import reparameterize, replace_convs
from repkern.train.config import TrainConfig
from repkern.train.data import DigitsData, TensorBatches, load_digits
from repkern.train.engine import Callback, Trainer
from repkern.train.measure import median_times, paired_times, training_memory, training_step
from repkern.train.reproducible import deterministic, seed_everything
from repkern.train.schedule import warmup_cosine

__all__ = ["FORMS", "QuickstartConfig", "run_quickstart"]

FORMS = ("plain", "orepa")

_STEP_ROUNDS = 21
_LATENCY_ROUNDS = 101


@dataclass(frozen=True)
class QuickstartConfig(TrainConfig):
    """Settings of `repkern quickstart`. `augment` is the strength of `data.random_affine`."""

    epochs: int = 32
    batch_size: int = 128
    learning_rate: float = 0.1
    label_smoothing: float = 0.1
    warmup_epochs: int = 2
    widths: tuple[int, ...] = (64, 128)
    blocks: int = 2
    augment: float = 1.0


def run_quickstart(
    config: QuickstartConfig,
    folder: Path,
    *,
    callbacks: Callable[[str], Sequence[Callback]] = lambda name: (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train both networks in `folder`, continuing what is there; deploy, save plain.safetensors, measure.

    `callbacks(name)` is asked for each of FORMS; `say` receives one line at the start of each later stage. Returns
    the summary of the run as JSON values. Raises engine.Interrupted, CheckpointError and MissingExtraError.
    """
    began = time.perf_counter()
    with deterministic(config.threads):
        data = load_digits()
        models: dict[str, nn.Module] = {}
        rows: dict[str, list[dict[str, Any]]] = {}
        for name in FORMS:
            trainer = make_trainer(name, config, data, folder / name, callbacks(name))
            trainer.resume()
            rows[name] = trainer.fit()
            models[name] = trainer.model.eval()
        summary = _deploy(models, config, data, folder, say)
        summary.update(_measure(models, config, data, say))
    summary["accuracy"] = {**{name: rows[name][-1]["test_accuracy"] for name in FORMS}, **summary["accuracy"]}
    summary["training_seconds"] = {name: round(sum(row["seconds"] for row in rows[name]), 1) for name in FORMS}
    summary["total_seconds"] = round(time.perf_counter() - began, 1)
    summary["config"] = config.to_dict()
    return summary


def make_model(name: str, config: QuickstartConfig) -> nn.Module:
    """The network called `name` in FORMS with its initial values, which depend on the seed alone."""
    seed_everything(config.seed)
    model: nn.Module = DigitsNet(config.widths, config.blocks)
    return model if name == "plain" else replace_convs(model)


def make_trainer(
    name: str, config: QuickstartConfig, data: DigitsData, folder: Path | None, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """Everything one of the two trainings needs, at epoch 0."""
    model = make_model(name, config).to(config.device)
    source = TensorBatches(data, config.batch_size, seed=config.seed, augment=config.augment, device=config.device)
    optimizer = make_optimizer(model, config)
    steps = config.epochs * source.steps_per_epoch
    warmup = min(config.warmup_epochs * source.steps_per_epoch, steps // 2)
    return Trainer(
        model,
        source,
        optimizer,
        epochs=config.epochs,
        loss=nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        scheduler=warmup_cosine(optimizer, steps, warmup),
        callbacks=callbacks,
        folder=folder,
    )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum; biases and norms are not decayed."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)


def _deploy(
    models: dict[str, nn.Module],
    config: QuickstartConfig,
    data: DigitsData,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Add the deployed network to `models`, save it, and say how far it is from the one that was trained."""
    from repkern import __version__

    say("Reparameterizing the OREPA network, checking that it still computes the same")
    images, labels = data.test_images.to(config.device), data.test_labels.to(config.device)
    deployed = reparameterize(models["orepa"], verify=images)
    assert isinstance(deployed, DigitsNet)
    models["deployed"] = deployed
    with torch.no_grad():
        trained_logits, deployed_logits = models["orepa"](images), deployed(images)
    accuracy = int((deployed_logits.argmax(1) == labels).sum()) / len(labels)
    save_digits_net(
        deployed, folder / "plain.safetensors", test_accuracy=accuracy, repkern=__version__, config=config.to_dict()
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
    models: dict[str, nn.Module], config: QuickstartConfig, data: DigitsData, say: Callable[[str], None]
) -> dict[str, Any]:
    say("Measuring step time, memory and latency, the networks taking turns")
    images = data.train_images[: config.batch_size].to(config.device)
    labels = data.train_labels[: config.batch_size].to(config.device)
    loss = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    for name in FORMS:
        model = copy.deepcopy(models[name]).train()
        optimizer = make_optimizer(model, config)
        steps[name] = training_step(model, optimizer, loss, images, labels)
        peaks[name] = training_memory(model, optimizer, steps[name], config.device)
    times = paired_times(steps, rounds=_STEP_ROUNDS, device=config.device)
    one = images[:1]
    with torch.inference_mode():
        latency = paired_times(
            {name: functools.partial(model, one) for name, model in models.items()},
            rounds=_LATENCY_ROUNDS,
            warmup=10,
            device=config.device,
        )
    return {
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()},
        "train_step_seconds": median_times(times),
        "train_peak_bytes": peaks,
        "latency_seconds": median_times(latency),
    }
