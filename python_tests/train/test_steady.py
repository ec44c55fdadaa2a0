"""What must not pile up, and the small parts that a step leans on."""

import gc
import multiprocessing
import os
import signal

import pytest
import torch
from small_training import EPOCHS, STEPS, At, assert_same, make_trainer, small_model
from torch import nn

from repkern.data import DataWorkerError
from repkern.models.small_vgg import SmallVGG
from repkern.nn import DyRepBlock
from repkern.train import Callback, StructureChanged
from repkern.train.build import build_data, build_trainer
from repkern.train.mean import SampleMean
from repkern.train.recipe import Recipe
from repkern.train.snapshot import BufferSnapshot


def live_tensors():
    gc.collect()
    return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())


class Count(Callback):
    def __init__(self):
        self.counts = []

    def on_step_end(self, trainer):
        if trainer.step % STEPS == 3:
            self.counts.append(live_tensors())


@pytest.mark.parametrize("options", [{}, {"ema": {"decay": 0.9}, "train": {"accumulate": 2, "epochs": 5}}])
def test_no_tensor_is_left_by_a_step(tmp_path, options):
    count = Count()
    make_trainer(tmp_path, callbacks=[count], checkpoint={"every_steps": 2}, **options).fit()
    assert len(set(count.counts[1:])) == 1, count.counts


@pytest.mark.unguarded  # the guards keep every buffer that native code writes to
def test_no_tensor_is_left_by_changes_of_the_network(tmp_path):
    """A branch that is grown and cut again leaves nothing in the optimizer, the moving average or the wrapper."""
    count = Count()

    def grow(trainer):
        trainer.model.stem.conv.add_branches(["1xk"])
        trainer.structure_changed(StructureChanged(("stem.conv",)))

    def cut(trainer):
        trainer.model.stem.conv.remove_branches(["1xk"])
        trainer.structure_changed(StructureChanged(("stem.conv",)))

    model = SmallVGG((4,), 1)
    model.stem.conv = DyRepBlock.grow(model.stem.conv, branches=("1x1", "kxk"))
    changes = [At(epoch * STEPS + step, act) for epoch in range(5) for step, act in ((1, grow), (2, cut))]
    make_trainer(tmp_path, model=model, callbacks=[*changes, count], train={"epochs": 5}, ema={"decay": 0.9}).fit()
    assert len(set(count.counts[1:])) == 1, count.counts


@pytest.mark.unguarded
def test_a_training_leaves_nothing_behind():
    def train():
        make_trainer(train={"epochs": 1}).fit()

    train()
    before = live_tensors()
    train()
    assert live_tensors() == before


def test_a_data_worker_that_dies_is_an_error_that_says_so_and_the_run_resumes(tmp_path):
    recipe = Recipe.model_validate({
        "model": {"options": {"widths": [4], "blocks": 1}},
        "data": {"workers": 2, "limit": 640},
        "train": {"epochs": 2, "batch_size": 64, "device": "cpu", "threads": 1},
        "checkpoint": {"every_steps": 4},
    })  # fmt: skip

    def kill(trainer):
        own = next(process for process in multiprocessing.active_children() if process not in before)
        os.kill(own.pid, signal.SIGKILL)

    def make(folder, callbacks=()):
        return build_trainer(recipe, build_data(recipe), folder=folder, callbacks=callbacks)

    whole = make(None)
    whole.fit()
    whole.data.close()
    before = multiprocessing.active_children()
    broken = make(tmp_path, [At(5, kill)])
    with pytest.raises(DataWorkerError, match=r"data workers? ended: process \d+ .*use fewer workers"):
        broken.fit()
    resumed = make(tmp_path)
    assert resumed.resume().step == 4
    resumed.fit()
    resumed.data.close()
    assert_same(whole, resumed)


def test_buffers_are_put_back_whether_changed_in_place_or_assigned():
    model = nn.Module()
    for name in ("changed", "assigned", "grown"):
        model.register_buffer(name, torch.arange(3.0))
    model.register_buffer("empty", torch.zeros(0))
    snapshot = BufferSnapshot(model)
    for _ in range(2):
        snapshot.take()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.changed.add_(1)
        model.assigned = model.assigned * float("nan")
        model.grown = torch.full((5,), float("nan"))
        snapshot.put_back()
        assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
        model.changed.add_(1)
        model.grown = torch.arange(float(len(model.grown) + 1))


def test_nothing_to_put_back():
    snapshot = BufferSnapshot(nn.Linear(2, 2))
    snapshot.take()
    snapshot.put_back()


def test_the_mean_is_over_samples_in_float64():
    mean = SampleMean().to("cpu")
    values = [(torch.tensor(0.1), 3), (torch.tensor(0.7, dtype=torch.bfloat16), 1), (torch.tensor(1e-9), 4)]
    for value, samples in values:
        mean.update(value, samples)
    wanted = sum(float(value) * samples for value, samples in values) / 8
    assert mean.compute().dtype == torch.float64
    assert mean.compute().item() == pytest.approx(wanted, rel=1e-15)
    mean.update(torch.tensor(float("nan")), 1)
    assert torch.isnan(mean.compute())


def test_the_row_of_the_last_epoch_is_there_when_all_is_done():
    trainer = make_trainer(model=small_model())
    assert len(trainer.fit()) == EPOCHS == len(trainer.fit())
