"""Losses, gradients and weights that are not finite: skipped, counted, and never saved."""

import pytest
import torch
from small_training import EPOCHS, STEPS, At, MemorySource, Notes, assert_same, make_trainer, small_model
from torch import nn

from repkern.train import Classification, TrainingDivergedError
from repkern.train.divergence import not_finite
from repkern.train.schedule import learning_rate_factor

BAD = float("nan")


def poisoned(*steps, value=BAD):
    def change(step, batch):
        return batch._replace(images=batch.images * value) if step in steps else batch

    return MemorySource(change=change)


def fill(value, step, where=lambda model: model[3].weight):
    def act(trainer):
        with torch.no_grad():
            where(trainer.model).view(-1)[0] = value

    return At(step, act)


@pytest.mark.parametrize("value", [BAD, float("inf")])
def test_a_skipped_step_is_as_a_loop_that_leaves_its_update_out(value):
    """Weights, statistics of norms, momentum and metrics are as they were; the schedule and the data go on."""
    data, skipped = poisoned(4, 7, value=value), (4, 7)
    notes = Notes()
    trainer = make_trainer(data=data, callbacks=[notes])
    rows = trainer.fit()
    model = small_model()
    kernels, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": kernels}, {"params": vectors, "weight_decay": 0}]
    weights = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    factor = learning_rate_factor(trainer.recipe.schedule, steps=EPOCHS * STEPS, steps_per_epoch=STEPS)
    model.train()
    for epoch in range(EPOCHS):
        for at, batch in enumerate(data.train_batches(epoch)):
            step = epoch * STEPS + at
            before = {name: buffer.clone() for name, buffer in model.named_buffers()}
            weights.zero_grad()
            for group in weights.param_groups:
                group["lr"] = 0.05 * factor(step)
            loss = nn.functional.cross_entropy(model(batch.images), batch.labels)
            loss.backward()
            if step in skipped:
                model.load_state_dict(before, strict=False)
            else:
                weights.step()
    assert all(
        torch.equal(a, b) for a, b in zip(trainer.model.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert [row.get("skipped_steps") for row in rows] == [1, 2, 2]
    assert all(torch.isfinite(torch.tensor(row["train_loss"])) for row in rows)
    assert [text.split(":")[0] for text in notes.texts] == ["step 5", "step 8"]
    assert "the loss is not finite" in notes.texts[0]


def test_it_is_put_back_with_accumulation_when_one_piece_is_bad():
    seen = []

    def change(step, batch):
        seen.append(step)
        return batch._replace(images=batch.images * BAD) if len(seen) == 2 else batch

    trainer = make_trainer(data=MemorySource(change=change), train={"accumulate": 4, "max_steps": 1})
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    row = trainer.fit()[0]
    assert row["skipped_steps"] == 1
    assert row["train_loss"] != row["train_loss"]  # nothing was counted
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_skipped_steps_resume_too(tmp_path):
    whole = make_trainer(data=poisoned(4, 7))
    whole.fit()
    stopping = At(6, lambda trainer: trainer._request.__setattr__("name", "SIGTERM"))
    with pytest.raises(Exception, match="SIGTERM"):
        make_trainer(tmp_path, data=poisoned(4, 7), callbacks=[stopping]).fit()
    resumed = make_trainer(tmp_path, data=poisoned(4, 7))
    resumed.resume()
    resumed.fit()
    assert_same(whole, resumed)
    assert resumed.skipped == 2


def test_too_many_in_a_row_end_it_and_the_last_good_checkpoint_is_named(tmp_path):
    trainer = make_trainer(tmp_path, data=poisoned(*range(9, 18)), train={"max_bad_steps": 3})
    with pytest.raises(
        TrainingDivergedError, match=r"the loss was not finite 3 times in a row.*step 12.*step_00000006"
    ):
        trainer.fit()
    assert make_trainer(tmp_path, data=poisoned(*range(9, 18)), train={"max_bad_steps": 3}).resume().step == 6


def test_single_bad_steps_do_not_add_up_to_an_end():
    trainer = make_trainer(data=poisoned(1, 2, 4, 5, 7, 8), train={"max_bad_steps": 3})
    trainer.fit()
    assert (trainer.skipped, trainer.skipped_in_a_row) == (6, 0)


def test_without_a_checkpoint_the_message_says_so():
    with pytest.raises(TrainingDivergedError, match=r"there is no checkpoint; lower the learning rate \(0\.05\)"):
        make_trainer(data=poisoned(0), train={"max_bad_steps": 1}).fit()


class ExplodingAt(Classification):
    """A finite loss whose gradient at one step is infinite: the square root of a square at zero, times infinity."""

    def __init__(self, trainer_recipe, step):
        super().__init__(trainer_recipe, 10)
        self._step, self._count = step, 0

    def loss(self, model, batch):
        result = super().loss(model, batch)
        if model.training:
            self._count += 1
            if self._count == self._step:
                zero = model[3].weight.sum() * 0
                return result._replace(loss=result.loss + torch.sqrt(zero))
        return result


def exploding(step, folder=None, **sections):
    from small_training import recipe

    return make_trainer(folder, task=ExplodingAt(recipe(**sections), step), **sections)


def test_an_infinite_gradient_is_skipped_where_its_norm_is_known():
    notes = Notes()
    trainer = exploding(8, train={"clip_norm": 1.0})
    trainer.callbacks.append(notes)
    rows = trainer.fit()
    assert trainer.skipped == 1
    assert "step 8: the gradient is not finite" in notes.texts[0]
    assert not not_finite(trainer.model)
    assert rows[-1]["skipped_steps"] == 1


def test_without_clipping_it_breaks_the_weights_which_ends_the_run_at_the_next_step(tmp_path):
    trainer = exploding(8, tmp_path, ema={"decay": 0.9})
    with pytest.raises(TrainingDivergedError, match=r"3\.weight is not finite, in step 9.*step_00000006.*clip"):
        trainer.fit()
    assert trainer.skipped == 1


@pytest.mark.parametrize("step", [STEPS, EPOCHS * STEPS])
def test_weights_broken_by_the_last_step_of_an_epoch_are_not_saved(tmp_path, step):
    trainer = exploding(step, tmp_path)
    with pytest.raises(TrainingDivergedError, match=r"3\.weight is not finite"):
        trainer.fit()
    assert trainer.step == step
    assert make_trainer(tmp_path).resume().step == step - STEPS


def test_broken_weights_are_not_saved_when_a_step_is(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[fill(BAD, 3)], checkpoint={"every_steps": 3})
    with pytest.raises(TrainingDivergedError, match="is not finite"):
        trainer.fit()
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.parametrize("value", [BAD, float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_what_is_looked_at(name, value):
    model = small_model()
    model.register_parameter("nothing", nn.Parameter(torch.zeros(0)))
    assert not_finite(model) == ""
    getattr(model[0][1], name).data[2] = value
    assert not_finite(model) == f"0.1.{name}"


def test_a_mask_may_be_infinite():
    model = small_model()
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    assert not_finite(model) == ""
    assert not_finite(nn.Flatten()) == ""
