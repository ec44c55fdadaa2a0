import json

import pytest
import torch

from repkern.train import Callback, CheckpointError, Interrupted, TrainingDivergedError

STEPS = 5  # 90 images in batches of 16, the rest dropped


class Counting(Callback):
    name = "counting"

    def __init__(self):
        self.steps = self.epochs = 0

    def on_step_end(self, trainer):
        self.steps += 1

    def on_epoch_end(self, trainer, row):
        self.epochs += 1
        row["steps_so_far"] = self.steps

    def state_dict(self):
        return {"steps": self.steps, "epochs": self.epochs}

    def load_state_dict(self, state):
        self.steps, self.epochs = state["steps"], state["epochs"]


def test_two_runs_are_the_same_and_another_seed_is_not(make_trainer, assert_same_bits, bits):
    trainers = []
    for seed in (3, 3, 4):
        trainers.append(make_trainer(seed=seed))
        trainers[-1].fit()
    first, second, third = trainers
    assert_same_bits(first, second)
    assert bits(third)[1] != bits(first)[1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("step", [1, STEPS, STEPS + 3, 3 * STEPS, 4 * STEPS])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path, make_trainer, interrupt_at, assert_same_bits, optimizer, step
):
    whole = make_trainer(optimizer=optimizer)
    whole.fit()
    broken = make_trainer(tmp_path, callbacks=[interrupt_at(step)], optimizer=optimizer)
    with pytest.raises(Interrupted) as caught:
        broken.fit()
    finished = (step - 1) // STEPS
    assert caught.value.epoch == finished
    torch.manual_seed(99)
    resumed = make_trainer(tmp_path, optimizer=optimizer)
    assert resumed.resume() == finished
    resumed.fit()
    assert_same_bits(whole, resumed)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == resumed.rows
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 4


def test_a_finished_run_resumes_to_nothing_to_do(tmp_path, make_trainer, assert_same_bits):
    done = make_trainer(tmp_path)
    done.fit()
    again = make_trainer(tmp_path)
    assert again.resume() == 4
    again.fit()
    assert_same_bits(done, again)


def test_a_row_without_its_checkpoint_is_computed_again(tmp_path, make_trainer, assert_same_bits, monkeypatch):
    whole = make_trainer()
    whole.fit()
    broken = make_trainer(tmp_path)
    real = broken._checkpoints.save

    def save(epoch, model, state):
        if epoch == 3:
            raise KeyboardInterrupt
        real(epoch, model, state)

    monkeypatch.setattr(broken._checkpoints, "save", save)
    with pytest.raises(Interrupted):
        broken.fit()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    resumed = make_trainer(tmp_path)
    assert resumed.resume() == 2
    resumed.fit()
    assert_same_bits(whole, resumed)


def test_callbacks_keep_their_state(tmp_path, make_trainer, interrupt_at):
    with pytest.raises(Interrupted):
        make_trainer(tmp_path, callbacks=[Counting(), interrupt_at(STEPS + 2)]).fit()
    counting = Counting()
    trainer = make_trainer(tmp_path, callbacks=[counting])
    trainer.resume()
    trainer.fit()
    assert [row["steps_so_far"] for row in trainer.rows] == [STEPS, 2 * STEPS, 3 * STEPS, 4 * STEPS]
    assert counting.epochs == 4


def test_callbacks_with_state_need_different_names(make_trainer):
    with pytest.raises(ValueError, match="names of their own"):
        make_trainer(callbacks=[Counting(), Counting()])


def test_gradients_can_be_changed_before_the_step(make_trainer):
    class Freeze(Callback):
        def on_gradients(self, trainer):
            for parameter in trainer.model.parameters():
                parameter.grad.zero_()

    trainer = make_trainer(callbacks=[Freeze()])
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_an_epoch_is_announced_only_when_it_is_safe(tmp_path, make_trainer):
    class Check(Callback):
        epochs = 0

        def on_epoch_saved(self, trainer, row):
            self.epochs += 1
            assert trainer.epoch == row["epoch"] == self.epochs
            assert make_trainer(tmp_path).resume() == self.epochs

    check = Check()
    make_trainer(tmp_path, callbacks=[check]).fit()
    assert check.epochs == 4


def test_evaluation_puts_the_mode_back(make_trainer):
    trainer = make_trainer()
    trainer.model.train()
    trainer.evaluate()
    assert trainer.model.training
    trainer.model.eval()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert not trainer.model.training
    assert first == second


def test_divergence_is_an_error_and_is_not_checkpointed(tmp_path, make_trainer):
    class Explode(Callback):
        def on_step_end(self, trainer):
            if trainer.epoch == 1:
                next(trainer.model.parameters()).data.fill_(float("nan"))

    with pytest.raises(TrainingDivergedError, match=r"nan in epoch 2; lower the learning rate"):
        make_trainer(tmp_path, callbacks=[Explode()]).fit()
    assert make_trainer(tmp_path).resume() == 1


def test_metrics_that_do_not_reach_the_checkpoint_are_an_error(tmp_path, make_trainer):
    make_trainer(tmp_path, epochs=2).fit()
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(CheckpointError, match=r"should hold epochs 1 to 2, got \[1\]"):
        make_trainer(tmp_path, epochs=2).resume()


def test_damaged_metrics_are_an_error(tmp_path, make_trainer):
    make_trainer(tmp_path, epochs=1).fit()
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl is damaged"):
        make_trainer(tmp_path, epochs=1).resume()


def test_epochs_must_be_positive(make_trainer):
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        make_trainer(epochs=0)
