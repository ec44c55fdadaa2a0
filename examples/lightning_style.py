"""Blocks of repkern in a LightningModule, trained by Lightning's Trainer with its moving average of the weights.

Needs Lightning (pip install lightning), and one line of repkern: `replace_convs` where the network is made.

python examples/lightning_style.py
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from typing import Any

import torch
from shapes import draw_shapes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import repkern
from repkern.optim import weight_decay_groups

try:
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
except ImportError as error:
    raise SystemExit(f"this example needs Lightning ({error}): pip install lightning") from None

NAMES = ("circle", "square", "triangle", "cross")


class Shapes(lightning.LightningModule):
    """A classifier of pictures of shapes, as one would write it without repkern, but for one line."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(NAMES)),
        )  # fmt: skip
        # Here, so that load_from_checkpoint makes the same blocks before it loads their weights.
        self.network = repkern.replace_convs(network, preserve=True)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, 4]."""
        return self.network(images)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        """Accuracy; Lightning has put the moving average in place."""
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Kernels decay, norms and scales of branches do not; the learning rate falls along a cosine."""
        groups = weight_decay_groups(self, 5e-4)
        optimizer = torch.optim.SGD(groups, lr=self.hparams["lr"], momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams["lr"], steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(count: int, batch_size: int, seed: int, shuffle: bool = False) -> DataLoader[Any]:
    """Images in [-1, 1] and their labels."""
    images, labels = draw_shapes(NAMES, count, seed=seed)
    return DataLoader(TensorDataset(images / 127.5 - 1, labels), batch_size, shuffle=shuffle)


def main() -> None:
    """Train, load the best checkpoint, deploy, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=1024, help="pictures to train on")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--devices", type=int, default=1, help="processes, which Lightning starts and joins by DDP")
    parser.add_argument("--precision", default="32-true", help="as Lightning calls them: bf16-mixed, ...")
    options = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    test = loader(256, 256, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="accuracy", mode="max")
        trainer = lightning.Trainer(
            max_epochs=options.epochs, devices=options.devices, precision=options.precision,
            callbacks=[best, EMAWeightAveraging(decay=0.9)], logger=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Shapes(), loader(options.images, options.batch_size, seed=0, shuffle=True), test)
        if not trainer.is_global_zero:
            return
        trained = Shapes.load_from_checkpoint(best.best_model_path).eval()
    images, labels = next(iter(test))
    plain = repkern.reparameterize(trained, verify=images)
    for name, module in (("trained", trained), ("deployed", plain)):
        with torch.inference_mode():
            accuracy = (module(images).argmax(1) == labels).float().mean().item()
        print(f"{name}: {sum(p.numel() for p in module.parameters())} parameters, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
