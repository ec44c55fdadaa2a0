import pytest
import torch
from torch import nn

from repkern.train.data import DigitsData, TensorBatches
from repkern.train.engine import Callback, Trainer
from repkern.train.reproducible import seed_everything
from repkern.train.schedule import warmup_cosine


class InterruptAt(Callback):
    """Ctrl-C during the given step, counted over all epochs of one fit."""

    def __init__(self, step):
        self._left = step

    def on_step_end(self, trainer):
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def interrupt_at():
    return InterruptAt


@pytest.fixture
def bits():
    """All that must agree between two runs: weights, buffers, optimizer state, and metrics but for the time taken."""

    def of(trainer):
        tensors = {f"model.{name}": tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        for index, state in trainer.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()})
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in trainer.rows]
        return tensors, rows

    return of


@pytest.fixture
def assert_same_bits(bits):
    def check(one, other):
        (tensors, rows), (other_tensors, other_rows) = bits(one), bits(other)
        assert rows == other_rows
        assert tensors.keys() == other_tensors.keys()
        different = [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])]
        assert not different

    return check


def random_data():
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(120, 1, 8, 8, generator=generator)
    labels = torch.arange(120) % 10
    return DigitsData(images[:90], labels[:90], images[90:], labels[90:])


@pytest.fixture
def make_trainer():
    """A small network with dropout, so that the global generators matter too."""

    def make(folder=None, *, epochs=4, callbacks=(), seed=3, learning_rate=0.05, optimizer="sgd"):
        seed_everything(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(216, 10)
        )
        data = TensorBatches(random_data(), 16, seed=seed, augment=1.0)
        if optimizer == "sgd":
            steps = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, nesterov=True)
        else:
            steps = torch.optim.AdamW(model.parameters(), learning_rate)
        return Trainer(
            model,
            data,
            steps,
            epochs=epochs,
            loss=nn.CrossEntropyLoss(),
            scheduler=warmup_cosine(steps, max(epochs, 2) * data.steps_per_epoch, data.steps_per_epoch),
            callbacks=callbacks,
            folder=folder,
        )

    return make
