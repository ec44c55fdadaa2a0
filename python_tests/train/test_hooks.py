"""The order of hooks, what they may do, and the shape of a training: epochs, steps, tests."""

import pytest
import torch
from small_training import EPOCHS, STEPS, At, MemorySource, Notes, assert_same, make_trainer, small_model
from torch import nn

from repkern.train import Callback, CheckpointError

HOOKS = (
    "on_fit_start",
    "on_step_begin",
    "on_gradients",
    "on_step_end",
    "on_epoch_end",
    "on_epoch_logged",
    "on_saved",
)


class Recorder(Callback):
    def __init__(self):
        self.seen = []
        for hook in HOOKS:
            setattr(self, hook, self._record(hook))

    def _record(self, hook):
        return lambda trainer, *rest: self.seen.append((hook, trainer.epoch, trainer.step, len(trainer.rows)))


def test_the_order_of_hooks(tmp_path):
    recorder = Recorder()
    make_trainer(tmp_path, callbacks=[recorder], train={"epochs": 2, "max_steps": STEPS + 1}).fit()
    wanted = [("on_fit_start", 0, 0, 0)]
    for epoch, steps in enumerate([range(STEPS), range(STEPS, STEPS + 1)]):
        for step in steps:
            wanted += [(hook, epoch, step + (hook == "on_step_end"), epoch) for hook in HOOKS[1:4]]
        end = steps[-1] + 1
        wanted.append(("on_epoch_end", epoch, end, epoch))
        wanted += [(hook, epoch + 1, end, epoch + 1) for hook in ("on_epoch_logged", "on_saved")]
    assert recorder.seen == wanted


def test_max_steps_may_end_within_an_epoch():
    trainer = make_trainer(train={"epochs": 3, "max_steps": STEPS + 2})
    rows = trainer.fit()
    assert (trainer.epochs, trainer.total_steps, trainer.step, trainer.done) == (2, STEPS + 2, STEPS + 2, True)
    assert [row["step"] for row in rows] == [STEPS, STEPS + 2]
    assert make_trainer(train={"epochs": 2, "max_steps": 99}).total_steps == 2 * STEPS


def test_the_schedule_ends_where_the_training_does():
    rates = []

    class Look(Callback):
        def on_gradients(self, trainer):
            rates.append(trainer.optimizers["weights"].param_groups[0]["lr"])

    make_trainer(callbacks=[Look()], train={"max_steps": 8}, schedule={"name": "linear"}).fit()
    assert rates == pytest.approx([0.05 * (1 - step / 8) for step in range(8)])


def test_only_every_nth_epoch_is_tested_and_the_last():
    rows = make_trainer(train={"epochs": 4, "eval_every": 3}).fit()
    assert [("test_accuracy" in row, "train_accuracy" in row) for row in rows] == [
        (False, True), (False, True), (True, True), (True, True),
    ]  # fmt: skip


def test_a_row():
    row = make_trainer(train={"epochs": 1}).fit()[0]
    assert list(row)[:3] == ["epoch", "step", "learning_rate"]
    assert set(row) == {
        *("epoch", "step", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("seconds", "images_per_second"),
    }  # fmt: skip


def test_top5_from_twenty_classes_on():
    data = MemorySource()
    data.classes = tuple(map(str, range(20)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20))
    row = make_trainer(model=model, data=data, train={"epochs": 1}).fit()[0]
    assert 0 <= row["test_accuracy"] <= row["test_top5"] <= 1


def test_the_metrics_of_a_test_are_those_of_the_whole_set():
    trainer = make_trainer(model=small_model().double(), data=MemorySource(dtype=torch.float64))
    trainer.model.eval()
    images, labels = trainer.data.images[:64], trainer.data.labels[:64]
    outputs = trainer.model(images)
    found = trainer.evaluate()
    assert found["test_loss"] == pytest.approx(nn.functional.cross_entropy(outputs, labels).item(), rel=1e-6)
    assert found["test_accuracy"] == pytest.approx((outputs.argmax(1) == labels).double().mean().item(), rel=1e-6)


def test_values_that_a_callback_adds_are_logged(tmp_path):
    from repkern.train.metrics import read_rows

    class Add(Callback):
        def on_epoch_end(self, trainer, row):
            row["extra"] = trainer.epoch

    make_trainer(tmp_path, callbacks=[Add()]).fit()
    assert [row["extra"] for row in read_rows(tmp_path)] == [0, 1, 2]


def test_gradients_can_be_changed_before_the_step():
    class Freeze(Callback):
        def on_gradients(self, trainer):
            for parameter in trainer.model.parameters():
                parameter.grad.zero_()

    trainer = make_trainer(callbacks=[Freeze()], optimizer={"weight_decay": 0.0})
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_what_was_saved_is_safe_when_it_is_announced(tmp_path):
    seen = []

    class Check(Callback):
        def on_saved(self, trainer, path):
            seen.append(trainer.step)
            assert path == trainer.saved
            state = torch.get_rng_state()  # the other training draws its own weights
            assert make_trainer(tmp_path).resume() == trainer.position
            torch.set_rng_state(state)

    make_trainer(tmp_path, callbacks=[Check()], checkpoint={"every_steps": 4}).fit()
    assert seen == [4, 6, 8, 12, 16, 18]


def test_a_test_in_the_middle_of_an_epoch_changes_nothing():
    plain = make_trainer()
    plain.fit()
    watched = make_trainer(callbacks=[At(4, lambda trainer: trainer.evaluate())])
    watched.fit()
    assert_same(plain, watched)


def test_frozen_norms_keep_their_statistics_and_the_mode_of_each_module_is_put_back():
    model = small_model()
    model[1].eval()  # someone froze a stage by hand, outside of fit
    trainer = make_trainer(
        model=model, train={"frozen_norms": True}, callbacks=[At(4, lambda trainer: trainer.evaluate())]
    )
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weight = model[0][1].weight.clone()
    trainer.evaluate()
    assert not model[1].training
    trainer.fit()
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert not torch.equal(weight, model[0][1].weight)


def test_a_test_after_an_interrupted_run_is_whole(tmp_path):
    from repkern.train import Interrupted

    trainer = make_trainer(tmp_path, callbacks=[At(3, lambda trainer: setattr(trainer._request, "name", "SIGTERM"))])
    with pytest.raises(Interrupted):
        trainer.fit()
    assert set(trainer.evaluate()) == {"test_loss", "test_accuracy"}


def test_an_interrupted_fit_goes_on_in_the_same_process(tmp_path):
    from repkern.train import Interrupted

    whole = make_trainer()
    whole.fit()
    trainer = make_trainer(tmp_path, callbacks=[At(3, lambda trainer: setattr(trainer._request, "name", "SIGTERM"))])
    with pytest.raises(Interrupted, match="SIGTERM after step 4"):
        trainer.fit()
    trainer.fit()
    assert_same(whole, trainer)


def test_data_that_end_early_are_an_error():
    class Short(MemorySource):
        def train_batches(self, *arguments):
            yield from list(super().train_batches(*arguments))[: STEPS - 1]

    with pytest.raises(RuntimeError, match="the data ended at step 6 of epoch 1, which should have 6 steps of 1"):
        make_trainer(data=Short()).fit()


def test_callbacks_with_state_need_different_names():
    class Counting(Callback):
        name = "counting"

        def state_dict(self):
            return {"count": 1}

    class Unnamed(Counting):
        name = ""

    for callbacks in ([Counting(), Counting()], [Unnamed()]):
        with pytest.raises(ValueError, match="names of their own"):
            make_trainer(callbacks=callbacks)


def test_a_folder_with_later_checkpoints_is_refused(tmp_path):
    make_trainer(tmp_path).fit()
    with pytest.raises(CheckpointError, match=r"step_00000018 is later than this run, which is at step 0: resume it"):
        make_trainer(tmp_path).fit()
    again = make_trainer(tmp_path)
    again.resume()
    assert again.done
    assert len(again.fit()) == EPOCHS


def test_notes_reach_every_callback():
    one, other = Notes(), Notes()
    make_trainer(callbacks=[one, other]).note("hello")
    assert one.texts == other.texts == ["hello"]
