"""A training that is interrupted after any step and resumed equals one that was not, bit for bit."""

import pytest
import torch
from small_training import EPOCHS, STEPS, At, MemorySource, Notes, assert_same, make_trainer, small_model
from torch import nn

from repkern.models.small_vgg import SmallVGG
from repkern.nn import ConvNormAct, DyRepBlock, RepVGGBlock
from repkern.train import Callback, CheckpointError, Interrupted, StructureChanged
from repkern.train.metrics import read_rows

EVERYTHING = {"ema": {"decay": 0.9, "every": 2}, "train": {"accumulate": 2, "clip_norm": 1.0}}


def stop(trainer):
    trainer._request.name = "SIGTERM"


def run_with_stops(folder, steps, make):
    """`make(folder, callbacks)` trained to the end, interrupted when so many steps are done, each in a new trainer."""
    for step in steps:
        trainer = make(folder, [At(step, stop, "on_step_begin")])
        trainer.resume()
        with pytest.raises(Interrupted) as caught:
            trainer.fit()
        assert caught.value.saved == folder / "checkpoints" / f"step_{step + 1:08d}"
        torch.manual_seed(99)  # another process would have other random states
    trainer = make(folder, [])
    trainer.resume()
    trainer.fit()
    return trainer


@pytest.mark.parametrize("options", [{}, {"optimizer": {"name": "adamw"}}, EVERYTHING], ids=["sgd", "adamw", "all"])
def test_after_every_step(tmp_path, options):
    def make(folder, callbacks):
        return make_trainer(folder, callbacks=callbacks, checkpoint={"keep": 1}, **options)

    whole = make(None, [])
    whole.fit()
    resumed = run_with_stops(tmp_path, range(EPOCHS * STEPS - 1), make)
    assert_same(whole, resumed)
    assert read_rows(tmp_path) == resumed.rows


@pytest.mark.parametrize("block", ["repvgg", "orepa", "dbb"])
def test_blocks(tmp_path, block):
    def make(folder, callbacks):
        torch.manual_seed(0)
        return make_trainer(folder, model=SmallVGG((4,), 2, block=block), callbacks=callbacks)

    whole = make(None, [])
    whole.fit()
    assert_same(whole, run_with_stops(tmp_path, [3, 5, 13], make))


def test_a_finished_run_resumes_to_nothing_to_do(tmp_path):
    done = make_trainer(tmp_path)
    done.fit()
    again = make_trainer(tmp_path)
    assert again.resume() == (EPOCHS, 0, EPOCHS * STEPS)
    again.fit()
    assert_same(done, again)


def test_an_empty_folder_begins_at_the_first_step(tmp_path):
    assert make_trainer(tmp_path).resume() == (0, 0, 0)
    assert make_trainer(None).resume() == (0, 0, 0)


class Counting(Callback):
    """Has state, and a trained tensor of its own with an optimizer of its own."""

    name = "counting"

    def __init__(self):
        self.steps = 0
        self.alpha = nn.Parameter(torch.zeros(3))

    def on_step_end(self, trainer):
        self.steps += 1
        self.alpha.grad = torch.full((3,), float(self.steps))

    def on_epoch_end(self, trainer, row):
        row["steps_so_far"] = self.steps

    def named_parameters(self):
        return {"alpha": self.alpha}

    def state_dict(self):
        return {"steps": self.steps, "alpha": self.alpha.detach()}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        with torch.no_grad():
            self.alpha.copy_(state["alpha"])
        self.alpha.grad = torch.full((3,), float(self.steps))


def make_two_optimizers(folder, callbacks):
    counting, model = Counting(), small_model()
    optimizers = {
        "weights": torch.optim.SGD(model.named_parameters(), 0.05, momentum=0.9),
        "alpha": torch.optim.Adam([counting.alpha], 0.01),
    }
    return make_trainer(folder, model=model, callbacks=[counting, *callbacks], optimizers=optimizers)


def test_callbacks_and_their_optimizers_go_on(tmp_path):
    whole = make_two_optimizers(None, [])
    whole.fit()
    resumed = run_with_stops(tmp_path, [STEPS + 2, 2 * STEPS], make_two_optimizers)
    assert_same(whole, resumed)
    assert torch.equal(whole.callbacks[0].alpha, resumed.callbacks[0].alpha)
    assert [row["steps_so_far"] for row in resumed.rows] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_a_callback_whose_state_is_there_must_be_there(tmp_path):
    run_with_stops(tmp_path, [2], lambda folder, callbacks: make_trainer(folder, callbacks=[Only(), *callbacks]))
    with pytest.raises(CheckpointError, match="holds the state of only, a callback that this training lacks"):
        make_trainer(tmp_path).resume()


def test_other_optimizers_are_named_before_anything_is_loaded(tmp_path):
    make_two_optimizers(tmp_path, []).fit()
    trainer = make_trainer(tmp_path, callbacks=[Counting()])
    before = trainer.model[3].weight.clone()
    with pytest.raises(CheckpointError, match="holds the optimizers weights, alpha, this training has weights"):
        trainer.resume()
    assert torch.equal(before, trainer.model[3].weight)


class Only(Callback):
    name = "only"

    def state_dict(self):
        return {"any": 1}


def test_a_callback_that_is_new_is_told_so(tmp_path):
    make_trainer(tmp_path).fit()
    notes = Notes()
    make_trainer(tmp_path, callbacks=[Only(), notes]).resume()
    assert notes.texts == ["the checkpoint has no state of the callback only, which begins anew"]


# Networks that change -------------------------------------------------------------------------------------------------


class Change(Callback):
    """The same change of the network at the same step of every run, whatever was interrupted before."""

    def __init__(self, step, change, event, **said):
        self._step, self._change, self._said = step, change, said
        setattr(self, event, self._act)

    def _act(self, trainer, *rest):
        if trainer.step == self._step:
            torch.manual_seed(5)
            path, state = self._change(trainer.model)
            trainer.structure_changed(StructureChanged((path,), state=state, **self._said))


def to_repvgg(model):
    old = model.stages[0][1]
    new = RepVGGBlock(old.conv.in_channels, old.conv.out_channels, 3, activation=nn.ReLU())
    model.stages[0][1] = new
    state = {new.dense.weight: {"momentum_buffer": torch.full_like(new.dense.weight, 0.25)}}
    return "stages.0.1", state


def grow(model):
    old = model.stages[0][1].conv
    model.stages[0][1].conv = DyRepBlock.grow(old, branches=("1x1", "kxk", "1xk"))
    return "stages.0.1.conv", {}


def make_changing(events, changes, *, replay=False, **options):
    def make(folder, callbacks):
        torch.manual_seed(0)
        model = SmallVGG((4,), 2, block="conv_bn")
        said = {"replay": lambda network: (torch.manual_seed(5), changes[0][1](network))} if replay else {}
        own = [Change(step, change, event, **said) for (step, change), event in zip(changes, events, strict=True)]
        return make_trainer(folder, model=model, callbacks=[*own, *callbacks], ema={"decay": 0.9}, **options)

    return make


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_epoch_end"])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("change", [to_repvgg, grow])
def test_a_changed_network_resumes(tmp_path, event, replay, change):
    step = STEPS if event == "on_epoch_end" else 4
    make = make_changing([event], [(step, change)], replay=replay)
    whole = make(None, [])
    whole.fit()
    resumed = run_with_stops(tmp_path, [2, step - 1, step, step + 1, 15], make)
    assert_same(whole, resumed)
    kinds = {type(module) for module in resumed.model.modules()}
    assert kinds & {RepVGGBlock, DyRepBlock}
    assert [type(m) for m in resumed.average.module.modules()] == [type(m) for m in resumed.model.modules()]


def test_several_changes_growing_and_cutting(tmp_path):
    def cut(model):
        model.stages[0][1].conv.remove_branches(["1xk"])
        return "stages.0.1.conv", {}

    def nest(model):
        block = model.stages[0][1].conv
        block.dense = DyRepBlock.grow(block.dense, branches=("1x1", "kxk"))
        return "stages.0.1.conv.dense", {}

    changes = [(3, grow), (STEPS, cut), (STEPS + 3, nest)]
    make = make_changing(["on_step_end", "on_epoch_end", "on_step_begin"], changes)
    whole = make(None, [])
    whole.fit()
    assert_same(whole, run_with_stops(tmp_path, [2, 4, STEPS - 1, STEPS, STEPS + 2, STEPS + 3, 14], make))


def test_a_change_keeps_what_does_not_change():
    seen = {}

    def watch(model):
        seen["before"] = {n: p for n, p in model.named_parameters()}
        seen["momentum"] = {n: weights.state[p]["momentum_buffer"] for n, p in seen["before"].items()}
        path, state = to_repvgg(model)
        seen["given"] = next(iter(state.values()))["momentum_buffer"]
        return path, state

    def look(trainer):
        for name, parameter in trainer.model.named_parameters():
            state = weights.state.get(parameter, {}).get("momentum_buffer")
            if name.startswith("stages.0.1."):
                assert (state is seen["given"]) if name.endswith("dense.weight") else state is None
            else:
                assert parameter is seen["before"][name]
                assert state is seen["momentum"][name]
        seen["looked"] = True

    torch.manual_seed(0)
    model = SmallVGG((4,), 2, block="conv_bn")
    trainer = make_trainer(model=model, callbacks=[Change(4, watch, "on_step_end"), At(4, look, "on_step_begin")])
    weights = trainer.optimizers["weights"]
    trainer.fit()
    assert seen["looked"]


def test_a_change_without_a_word_is_an_error_at_the_next_checkpoint(tmp_path):
    def silent(trainer):
        trainer.model.stages[0][1] = ConvNormAct(4, 4, 3)

    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, model=SmallVGG((4,), 2), callbacks=[At(4, silent)])
    with pytest.raises(ValueError, match=r"that the network lacks.*call Trainer\.structure_changed"):
        trainer.fit()
    assert trainer.saved is None


def test_a_module_that_a_file_cannot_describe_is_refused_at_once(tmp_path):
    class Own(nn.Conv2d):
        pass

    def change(model):
        model.stages[0][1].conv = Own(4, 4, 3, padding=1, bias=False)
        return "stages.0.1.conv", {}

    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, model=SmallVGG((4,), 2), callbacks=[Change(4, change, "on_step_end")])
    with pytest.raises(ValueError, match=r"stages\.0\.1\.conv is a .*Own; only classes of torch\.nn and repkern\.nn"):
        trainer.fit()
    assert trainer.step == 4


# What cannot be resumed -----------------------------------------------------------------------------------------------


def test_another_recipe_is_an_error_that_names_the_fields(tmp_path):
    make_trainer(tmp_path).fit()
    with pytest.raises(CheckpointError, match=r"train\.epochs 3, not 5; optimizer\.lr 0\.05, not 0\.1"):
        make_trainer(tmp_path, train={"epochs": 5}, optimizer={"lr": 0.1}).resume()
    with pytest.raises(CheckpointError, match=r"data: seed 7, not 8"):
        make_trainer(tmp_path, data=MemorySource(seed=8)).resume()
    with pytest.raises(CheckpointError, match=r"ema"):
        make_trainer(tmp_path, ema={"decay": 0.5}).resume()


def test_settings_that_do_not_change_what_is_computed_may_differ(tmp_path):
    make_trainer(tmp_path).fit()
    notes = Notes()
    trainer = make_trainer(tmp_path, checkpoint={"keep": 7}, train={"threads": 2}, callbacks=[notes])
    assert trainer.resume().step == EPOCHS * STEPS
    assert [text.split(":")[0] for text in notes.texts] == ["saved with 1 CPU threads, continued with 2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.__setitem__(3, nn.Linear(216, 10, bias=False)), r"only the checkpoint has 3\.bias"),
        (lambda m: m.append(nn.PReLU()), r"only the network has 4\.weight"),
        (lambda m: m[0].__setitem__(0, nn.Conv2d(1, 6, 3, bias=False)), r"only the checkpoint has 0\.0\.bias"),
        (lambda m: m[0].__setitem__(0, nn.Conv2d(1, 6, 1)), r"0\.0\.weight is \[6, 1, 3, 3\], .*\[6, 1, 1, 1\]"),
    ],
)  # fmt: skip
def test_another_model_is_an_error_that_leaves_it_alone(tmp_path, change, message):
    make_trainer(tmp_path).fit()
    model = small_model()
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model=model)
    with pytest.raises(CheckpointError, match=f"does not fit this training: {message}"):
        trainer.resume()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert trainer.position == (0, 0, 0)
