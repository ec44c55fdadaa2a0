"""A training small enough for a test: 96 random images in memory, a network of 2 000 weights with norms and dropout."""

import torch
from torch import nn

from repkern.data.batch import Batch, Shard
from repkern.train import Callback, Trainer, TrainingRecipe
from repkern.train.metrics import TIMES
from repkern.train.reproducible import seed_everything

STEPS = 6  # of an epoch
EPOCHS = 3


class MemorySource:
    """A DataSource of random images. batches: what to do to the batch of a step, by its number over all epochs."""

    classes = tuple("abcdefghij")
    channels, image_size, batch_size, steps_per_epoch = 1, 8, 16, STEPS

    def __init__(self, *, seed=7, classes=10, mixed=False, change=None, dtype=torch.float32):
        self.classes = self.classes[:classes]
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(96, 1, 8, 8, generator=generator, dtype=dtype)
        self.labels = torch.randint(0, classes, (96,), generator=generator)
        if mixed:
            shares = torch.rand(96, classes, generator=generator, dtype=dtype)
            self.labels = shares / shares.sum(1, keepdim=True)
        self._seed, self._change = seed, change

    def train_batches(self, epoch, first_step=0, shard=Shard()):  # noqa: B008
        order = torch.randperm(96, generator=torch.Generator().manual_seed(epoch))
        for step in range(first_step, STEPS):
            numbers = order[step * 16 : (step + 1) * 16]
            for part in numbers.chunk(shard.world)[shard.rank].chunk(shard.accumulate):
                batch = Batch(self.images[part], self.labels[part])
                yield batch if self._change is None else self._change(epoch * STEPS + step, batch)

    def test_batches(self, shard=Shard()):  # noqa: B008
        for first, last in ((0, 48), (48, 64)):  # unequal, as the last batch of a test set is
            part = slice(first + shard.rank, last, shard.world)
            labels = self.labels[part]
            yield Batch(self.images[part], labels.argmax(1) if labels.is_floating_point() else labels)

    def describe(self):
        return {"seed": self._seed, "classes": list(self.classes)}


def small_model(seed=3, dropout=0.3):
    seed_everything(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(216, 10),
    )


def recipe(**sections):
    """recipe(train={...}, ema={...}): each section over defaults that suit the small training."""
    train = {"epochs": EPOCHS, "batch_size": 16, "device": "cpu", "threads": 1, **sections.pop("train", {})}
    optimizer = {"lr": 0.05, **sections.pop("optimizer", {})}
    return TrainingRecipe.model_validate({"train": train, "optimizer": optimizer, **sections})


def make_trainer(folder=None, *, model=None, data=None, callbacks=(), optimizers=None, task=None, **sections):
    model = small_model() if model is None else model
    data = MemorySource() if data is None else data
    return Trainer(
        model, data, recipe(**sections), callbacks=callbacks, folder=folder, optimizers=optimizers, task=task
    )


class At(Callback):
    """Calls `act(trainer)` at `event` when so many steps are done."""

    def __init__(self, step, act, event="on_step_end"):
        self._step, self._act = step, act
        setattr(self, event, self._look)

    def _look(self, trainer, *rest):
        if trainer.step == self._step:
            self._act(trainer)


class Notes(Callback):
    """Collects what a person would be told."""

    def __init__(self):
        self.texts = []

    def on_note(self, trainer, text):
        self.texts.append(text)


def bits(trainer):
    """(tensors by name, rows without times): all that must agree between two trainings."""
    tensors = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    if trainer.average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in trainer.average.module.state_dict().items()}
    for kind, optimizer in trainer.optimizers.items():
        packed = optimizer.state_dict()
        for index, state in packed["state"].items():
            tensors |= {f"{kind}.{index}.{name}": torch.as_tensor(v) for name, v in state.items() if v is not None}
        tensors[f"{kind}.rates"] = torch.tensor([group["lr"] for group in packed["param_groups"]])
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in trainer.rows]
    return {name: tensor.clone() for name, tensor in tensors.items()}, rows


def assert_same(one, other):
    """Bit for bit, NaN counting as equal to NaN in rows."""
    (tensors, rows), (other_tensors, other_rows) = (x if isinstance(x, tuple) else bits(x) for x in (one, other))
    assert repr(rows) == repr(other_rows)
    assert tensors.keys() == other_tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])] == []
