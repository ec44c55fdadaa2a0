"""A task of your own, a network that grows while it is trained, and a run that is stopped and goes on.

The task is not classification: noise is taken out of scanned digits. Half way, convolutions grow branches (DyRep, arXiv
2203.12868) without changing what the network computes; optimizer and checkpoints follow. A second run is stopped by a
signal in the middle of an epoch, resumed from the plain network, and ends with the same bits as the first.

python examples/own_task.py
"""

from __future__ import annotations

import argparse
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio

import repkern
from repkern.data import Batch, ImageSource, open_digits
from repkern.nn import DyRepBlock
from repkern.train import Callback, Interrupted, Result, StructureChanged, Task, Trainer, TrainingRecipe
from repkern.train.recipe import OptimizerRecipe, RunRecipe


class Denoising(Task):
    """Mean squared error between clean images and what the network makes of noisy ones."""

    best = "test_psnr"  # highest in the best checkpoint

    def loss(self, model: nn.Module, batch: Batch) -> Result:
        """New noise in every step (checkpoints keep the state of torch's random numbers), the same in every test."""
        draws = None if model.training else torch.Generator().manual_seed(0)
        noise = torch.randn(batch.images.shape, generator=draws).to(batch.images)
        outputs = model(batch.images + 0.3 * noise)
        return Result((outputs - batch.images).square().mean(), outputs.detach(), len(batch.images))

    def metrics(self, prefix: str) -> MetricCollection:
        """Peak signal to noise ratio in decibels, for images in [0, 1]."""
        return MetricCollection({"psnr": PeakSignalNoiseRatio(data_range=1.0)}, prefix=prefix)

    def update(self, metrics: Any, result: Result, batch: Batch) -> None:
        """Count one batch in."""
        metrics["psnr"].update(result.outputs, batch.images)


class Grow(Callback):
    """Makes DyRepBlocks of the convolutions that a norm follows, after `epoch` epochs."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Before the checkpoint of this epoch, which therefore holds the new structure."""
        if row["epoch"] == self.epoch:
            for path in ("0", "3"):
                trainer.model.set_submodule(path, DyRepBlock.grow(trainer.model.get_submodule(path)))
            trainer.structure_changed(StructureChanged(("0", "3")))


class StopAt(Callback):
    """What Ctrl-C does, or a scheduler that wants the machine back: a signal at some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        """The trainer saves, and `fit` raises Interrupted."""
        if trainer.step == self.step:
            signal.raise_signal(signal.SIGTERM)


def make_trainer(epochs: int, folder: Path, *more: Callback) -> Trainer:
    """A new network and its trainer: what every start of a program makes."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Conv2d(16, 1, 3, padding=1),
    )
    data = ImageSource(*open_digits(), batch_size=32, seed=0)  # in [0, 1], as no mean and std are given
    recipe = TrainingRecipe(
        train=RunRecipe(epochs=epochs, batch_size=32, device="cpu", threads=1),
        optimizer=OptimizerRecipe(name="adamw", lr=5e-3),
    )
    return Trainer(network, data, recipe, task=Denoising(), callbacks=[Grow(epochs // 2), *more], folder=folder)


def main() -> None:
    """Once in one go, once with an interruption."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    epochs = parser.parse_args().epochs

    with tempfile.TemporaryDirectory() as name:
        with make_trainer(epochs, Path(name, "one")) as one:
            for row in one.fit():
                print(f"epoch {row['epoch']}  {row['test_psnr']:.2f} dB")
        with make_trainer(epochs, Path(name, "two"), StopAt(one.total_steps * 3 // 4)) as two:
            try:
                two.fit()
            except Interrupted as interruption:
                print(f"stopped: {interruption}")
        with make_trainer(epochs, Path(name, "two")) as two:
            print(f"goes on after step {two.resume().step}, with a {type(two.model[0]).__name__}")
            two.fit()
    others = two.model.state_dict()
    same = [torch.equal(tensor, others[name]) for name, tensor in one.model.state_dict().items()]
    print(f"the same bits in {sum(same)} of {len(same)} tensors")
    print(repkern.reparameterize(two.model.eval(), verify=next(iter(two.data.test_batches())).images))


if __name__ == "__main__":
    main()
