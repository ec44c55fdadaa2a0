"""Small trainings for tests of several processes: what they are made of, and what is written down about them."""

import hashlib
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from repkern.data.batch import Batch, Shard
from repkern.models import create_model
from repkern.models.small_vgg import SmallVGG
from repkern.nn import synchronize_norms
from repkern.train import Callback, Classification, Interrupted, StructureChanged, Trainer, TrainingRecipe
from repkern.train.reproducible import seed_everything
from repkern.train.sharded import whole

IMAGES, BATCH = 130, 24
TIMES = ("seconds", "images_per_second")


class Memory:
    """Random images; the order of an epoch is a function of its number."""

    classes = tuple("0123456789")
    batch_size = BATCH

    def __init__(self, channels=1, image_size=8):
        self.channels, self.image_size = channels, image_size
        self.steps_per_epoch = IMAGES // BATCH
        generator = torch.Generator().manual_seed(7)
        self._images = torch.randn(IMAGES, channels, image_size, image_size, generator=generator, dtype=torch.float64)
        self._labels = torch.randint(0, 10, (IMAGES,), generator=generator)

    def train_batches(self, epoch, first_step=0, shard=Shard()):  # noqa: B008
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))
        for step in range(first_step, self.steps_per_epoch):
            mine = order[step * BATCH : (step + 1) * BATCH].chunk(shard.world)[shard.rank]
            for piece in mine.chunk(shard.accumulate):
                yield Batch(self._images[piece], self._labels[piece])

    def test_batches(self, shard=Shard()):  # noqa: B008
        """Three batches: two processes have different numbers of them."""
        for number in range(shard.rank, 3, shard.world):
            yield Batch(self._images[number * 10 : number * 10 + 10], self._labels[number * 10 : number * 10 + 10])

    def describe(self):
        return {"images": IMAGES}


class Recording(Classification):
    """Keeps the loss of the last step of this process."""

    def __init__(self, recipe):
        super().__init__(recipe, 10)
        self.pieces = []

    def loss(self, model, batch):
        result = super().loss(model, batch)
        self.pieces.append(result.loss.detach())
        return result


class Watch(Callback):
    """The loss of each step over all processes, the first gradients, and the notes."""

    def __init__(self, task):
        self.losses, self.notes, self.gradients, self.last_piece = [], [], {}, 0.0
        self._task = task

    def on_gradients(self, trainer):
        if not self.gradients:
            self.gradients = {name: whole(p.grad).clone() for name, p in trainer.model.named_parameters()}

    def on_step_end(self, trainer):
        self.last_piece = self._task.pieces[-1].item()
        loss = torch.stack(self._task.pieces).mean().double()
        self._task.pieces.clear()
        trainer.runtime.average([loss])
        self.losses.append(loss.item())

    def on_note(self, trainer, text):
        self.notes.append(text)


class Misfortune(Callback):
    """At the end of a step something happens to one rank (or to all: -1), in the first life of the run only."""

    def __init__(self, kind, rank, step, ready=""):
        self._kind, self._rank, self._step, self._ready = kind, rank, step, ready

    def on_step_end(self, trainer):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if not (first and self._rank in (-1, trainer.runtime.rank) and trainer.step == self._step):
            return
        if self._kind == "exception":
            raise ValueError("this rank has a fault")
        if self._kind == "structure":
            trainer.structure_changed(StructureChanged(("stem",)))
        elif self._kind == "wait":  # for a signal from outside, which must not come before training has begun
            (Path(self._ready) / f"rank{trainer.runtime.rank}").touch()
            while not trainer._request:
                time.sleep(0.02)
        else:
            os.kill(os.getpid(), getattr(signal, self._kind))


def make_network(kind, block):
    if kind == "resnet":
        return create_model("resnet18", block=block, num_classes=10, in_chans=1, width=0.125)
    if kind in ("mixed", "dropout"):  # norms outside of blocks, of maps and of vectors
        body = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), SmallVGG((8, 16), 1, 12, 8, block)]
        return nn.Sequential(*body, nn.BatchNorm1d(12), nn.Dropout(0.2 * (kind == "dropout")), nn.Linear(12, 10))
    return SmallVGG((8, 16), 2, block=block)


def train(
    recipe,
    *,
    network="vgg",
    block="orepa",
    dtype="float32",
    sync=False,
    folder=None,
    resume=False,
    misfortune=None,
    runtime=None,
):
    """One training; returns what must agree between two of them, as JSON values and a dict of gradients."""
    recipe = TrainingRecipe.model_validate(recipe)
    seed_everything(3)
    model = make_network(network, block).to(getattr(torch, dtype))
    if sync:
        synchronize_norms(model)
    task = Recording(recipe)
    watch = Watch(task)
    callbacks = [watch, *([Misfortune(*misfortune)] if misfortune else [])]
    folder = folder and Path(folder)
    source = Memory(image_size=32 if network == "resnet" else 8)
    trainer = Trainer(model, source, recipe, task=task, callbacks=callbacks, folder=folder, runtime=runtime)
    with trainer:
        found = {"world": trainer.runtime.world, "interrupted": ""}
        found["began"] = list(trainer.resume()) if resume else [0, 0, 0]
        try:
            trainer.fit()
        except Interrupted as stopped:
            found |= {"interrupted": stopped.signal, "saved": str(stopped.saved)}
        found |= {"step": trainer.step, "losses": watch.losses, "notes": watch.notes, "digest": digest(trainer)}
        found["last_piece"] = watch.last_piece
        found["rows"] = [{k: v for k, v in row.items() if k not in TIMES} for row in trainer.rows]
    return found, watch.gradients


def digest(trainer):
    """A sum over weights, statistics, optimizer state and moving average."""
    average = {} if trainer.average is None else trainer.average.module.state_dict()
    optimizers = {name: optimizer.state_dict()["state"] for name, optimizer in trainer.optimizers.items()}
    total = hashlib.sha256()
    for name, tensor in flat(whole({"model": dict(trainer.model.state_dict()), "ema": dict(average), "o": optimizers})):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def flat(value, prefix=""):
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from flat(item, f"{prefix}.{name}")
