"""One training by several processes, each with its part of every batch, on this machine or on many.

torchrun --nproc-per-node 2 examples/two_processes.py
python examples/two_processes.py                         # the same batches, by one process

Stop it (Ctrl-C, or kill any process) and start it again with the same --folder: it goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from torch import nn

import repkern
from repkern.data import ImageSource, open_digits
from repkern.models.digits import DigitsNet
from repkern.train import Trainer, TrainingRecipe
from repkern.train.recipe import EMARecipe, OptimizerRecipe, RunRecipe, ScheduleRecipe


def make_model() -> nn.Module:
    """The same first values in every process, because each of them draws with the same seed."""
    torch.manual_seed(0)
    return repkern.replace_convs(DigitsNet(widths=(16, 32), blocks=1), preserve=True)


def fingerprint(model: nn.Module) -> str:
    """Short for all bits of the weights."""
    weights = b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in model.parameters())
    return hashlib.sha256(weights).hexdigest()[:12]


def main() -> None:
    """Train, and see that all processes have the same network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--folder", type=Path, help="for checkpoints and metrics; none: keep nothing")
    options = parser.parse_args()

    train, test = open_digits()
    data = ImageSource(train, test, batch_size=options.batch_size, seed=0, mean=(0.5,), std=(0.5,))
    recipe = TrainingRecipe(
        train=RunRecipe(epochs=options.epochs, batch_size=options.batch_size, device="cpu", threads=1),
        optimizer=OptimizerRecipe(lr=0.1),
        schedule=ScheduleRecipe(warmup_epochs=1),
        ema=EMARecipe(decay=0.99),
    )
    # The end of the block leaves the group of processes, in the order that gloo and NCCL need.
    with Trainer(make_model(), data, recipe, folder=options.folder) as trainer:
        position = trainer.resume()
        if trainer.runtime.is_main and position.step:
            print(f"goes on after step {position.step}")
        rows = trainer.fit()
        found = trainer.runtime.gather(fingerprint(trainer.model))  # every process calls it, rank 0 gets the list
        if trainer.runtime.is_main:
            for row in rows:
                print(f"epoch {row['epoch']}  loss {row['train_loss']:.4f}  accuracy {row['test_accuracy']:.1%}")
            print(f"{trainer.runtime.world} processes, weights {', '.join(found)}")
            if len(set(found)) > 1:
                raise SystemExit("the processes have different networks")


if __name__ == "__main__":
    main()
