"""The job of `repkern repopt`: one plain network, trained by SGD, by a RepOptimizer, and with RepVGG's branches."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from repkern.models import create_model
from repkern.models.files import replaced
from repkern.models.seal import WEIGHTS, sealed
from repkern.models.small_vgg import SmallVGG
from repkern.nn import reparameterize
from repkern.optim import RepSGD, from_scales, save_scales, weight_decay_groups
from repkern.search import HyperSearch
from repkern.train.config import TrainConfig
from repkern.train.data import DigitsData, TensorBatches, load_digits
from repkern.train.engine import Callback, Trainer
from repkern.train.folders import FlippedBatches, load_image_folder
from repkern.train.measure import median_times, paired_times, training_memory, training_step
from repkern.train.reproducible import deterministic, seed_everything
from repkern.train.schedule import warmup_cosine

__all__ = ["FORMS", "SEARCH", "RepOptConfig", "SearchProgress", "load_data", "run_hyper_search", "run_repopt"]

#: What is trained and compared. The first two are the same plain network, apart from its first values.
FORMS = ("sgd", "repopt", "repvgg", "qarepvgg")
#: What runs before them.
SEARCH = "search"
SCALES = "scales.safetensors"

_BLOCKS = {"sgd": "conv_bn", "repopt": "conv_bn", "repvgg": "repvgg", "qarepvgg": "qarepvgg"}
_STEP_ROUNDS = 21
_LATENCY_ROUNDS = 51


@dataclass(frozen=True)
class RepOptConfig(TrainConfig):
    """Settings of `repkern repopt`.

    model: a name of `repkern.create_model`, "" for a `SmallVGG` of `widths` and `blocks`. search_epochs: of the
    hyper-search, on the same training images. data: an image folder as `load_image_folder` reads it, "" for
    scikit-learn's digits; image_size: side of its images. augment: strength of `data.random_affine`.
    """

    epochs: int = 24
    search_epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 4e-5
    label_smoothing: float = 0.1
    warmup_epochs: int = 2
    widths: tuple[int, ...] = (32, 64)
    blocks: int = 6
    model: str = ""
    augment: float = 1.0
    data: str = ""
    image_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("search_epochs", "blocks", "image_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("augment", self.augment >= 0, "zero or more")


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


def load_data(config: RepOptConfig) -> DigitsData:
    """The images of `config`. Errors as `load_digits` and `load_image_folder`."""
    return load_image_folder(config.data, config.image_size) if config.data else load_digits()


def run_hyper_search(
    config: RepOptConfig,
    data: DigitsData,
    folder: Path,
    *,
    callbacks: _Callbacks = lambda name: (),
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Search the scales for the network of `config`, continuing what is in `folder`/search.

    Writes scales.safetensors there and returns the scales and the rows of the epochs. Raises engine.Interrupted and
    CheckpointError.
    """
    search = HyperSearch(make_network("conv_bn", config, data))
    progress = SearchProgress(search)
    searched = search.model.to(config.device)
    optimizer = _sgd(search.parameter_groups(config.weight_decay), config)
    own = [*callbacks(SEARCH), progress]
    trainer = _trainer(searched, optimizer, config, data, config.search_epochs, folder / SEARCH, own)
    trainer.resume()
    rows = trainer.fit()
    scales = {name: scale.cpu() for name, scale in search.scales().items()}
    save_scales(scales, folder / SCALES, config=config.to_dict(), search_accuracy=rows[-1]["test_accuracy"])
    return scales, rows


def run_repopt(
    config: RepOptConfig,
    folder: Path,
    *,
    callbacks: _Callbacks = lambda name: (),
    say: _Say = lambda text: None,
    quantize: Callable[[Mapping[str, nn.Module], DigitsData], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Search, train all FORMS in `folder`, continuing what is there; deploy, save, quantize and measure.

    callbacks(name): asked for SEARCH and each of FORMS; say: receives one line at the start of each later stage.
    quantize: receives the deployed networks and the data, and what it returns is the summary's "quantized".
    Returns the summary of the run as JSON values. Raises engine.Interrupted, CheckpointError and MissingExtraError.
    """
    from repkern import __version__

    began = time.perf_counter()
    with deterministic(config.threads):
        data = load_data(config)
        scales, searched = run_hyper_search(config, data, folder, callbacks=callbacks)
        models: dict[str, nn.Module] = {}
        rows: dict[str, list[dict[str, Any]]] = {SEARCH: searched}
        for name in FORMS:
            model, optimizer = make_training(name, config, data, scales)
            trainer = _trainer(model, optimizer, config, data, config.epochs, folder / name, callbacks(name))
            trainer.resume()
            rows[name] = trainer.fit()
            models[name] = trainer.model.eval()
        deployed = _deploy(models, data, config, folder, say)
        quantized = None
        if quantize is not None:
            say("Quantizing the deployed networks, with INT8 weights and activations")
            quantized = quantize(deployed, data)
        measured = _measure(models, deployed["sgd"], scales, config, data, say)
    return {
        "repkern": __version__,
        "torch": torch.__version__,
        "test_images": len(data.test_labels),
        "accuracy": {name: rows[name][-1]["test_accuracy"] for name in (SEARCH, *FORMS)},
        **measured,
        "quantized": quantized,
        "training_seconds": {name: round(sum(row["seconds"] for row in rows[name]), 1) for name in rows},
        "total_seconds": round(time.perf_counter() - began, 1),
        "config": config.to_dict(),
    }


def make_network(block: str, config: RepOptConfig, data: DigitsData) -> nn.Module:
    """The network of `config` with blocks of one kind; its initial values depend on the seed alone."""
    seed_everything(config.seed)
    classes, channels = int(data.train_labels.max()) + 1, data.train_images.shape[1]
    if config.model:
        return create_model(config.model, block=block, num_classes=classes, in_chans=channels)
    return SmallVGG(config.widths, config.blocks, classes, channels, block)


def make_training(
    name: str, config: RepOptConfig, data: DigitsData, scales: Mapping[str, Tensor]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network called `name` in FORMS, and what trains it."""
    model = make_network(_BLOCKS[name], config, data).to(config.device)
    return model, make_optimizer(name, model, config, scales)


def make_optimizer(
    name: str, model: nn.Module, config: RepOptConfig, scales: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """RepSGD for "repopt", which also gives `model` its first values; else SGD with the same settings."""
    if name != "repopt":
        return _sgd(weight_decay_groups(model, config.weight_decay), config)
    options: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.momentum > 0}
    optimizer = from_scales(model, scales, lr=config.learning_rate, weight_decay=config.weight_decay, **options)
    assert isinstance(optimizer, RepSGD)
    return optimizer


def _sgd(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)


def _trainer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RepOptConfig,
    data: DigitsData,
    epochs: int,
    folder: Path,
    callbacks: Sequence[Callback],
) -> Trainer:
    kind = FlippedBatches if config.data else TensorBatches
    source = kind(data, config.batch_size, seed=config.seed, augment=config.augment, device=config.device)
    steps = epochs * source.steps_per_epoch
    warmup = min(config.warmup_epochs * source.steps_per_epoch, steps // 2)
    return Trainer(
        model,
        source,
        optimizer,
        epochs=epochs,
        loss=nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        scheduler=warmup_cosine(optimizer, steps, warmup),
        callbacks=callbacks,
        folder=folder,
    )


def _deploy(
    models: Mapping[str, nn.Module], data: DigitsData, config: RepOptConfig, folder: Path, say: _Say
) -> dict[str, nn.Module]:
    """Every network as plain convolutions, proven to compute the same; that of "repopt" is written to a file."""
    say("Turning all networks into plain convolutions, checking that they still compute the same")
    images = data.test_images[: config.batch_size].to(config.device)
    deployed = {name: reparameterize(model, verify=images) for name, model in models.items()}
    with replaced(folder / "repopt.safetensors") as temporary:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in deployed["repopt"].state_dict().items()}
        save_file(tensors, str(temporary), metadata={WEIGHTS: sealed({}, tensors)})
    return deployed


def _measure(
    models: Mapping[str, nn.Module],
    plain: nn.Module,
    scales: Mapping[str, Tensor],
    config: RepOptConfig,
    data: DigitsData,
    say: _Say,
) -> dict[str, Any]:
    say("Measuring step time and memory, the networks taking turns")
    images = data.train_images[: config.batch_size].to(config.device)
    labels = data.train_labels[: config.batch_size].to(config.device)
    loss = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    for name in FORMS:
        model = copy.deepcopy(models[name]).train()
        optimizer = make_optimizer(name, model, config, scales)
        steps[name] = training_step(model, optimizer, loss, images, labels)
        peaks[name] = training_memory(model, optimizer, steps[name], config.device)
    times = paired_times(steps, rounds=_STEP_ROUNDS, device=config.device)
    with torch.inference_mode():
        latency = paired_times(
            {"deployed": functools.partial(plain, images[:1])}, rounds=_LATENCY_ROUNDS, warmup=10, device=config.device
        )
    return {
        "parameters": {name: sum(p.numel() for p in models[name].parameters()) for name in FORMS},
        "train_step_seconds": median_times(times),
        "train_peak_bytes": peaks,
        "latency_seconds": median_times(latency),
    }
