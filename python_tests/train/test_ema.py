"""The moving average: its formula, matched by name, and what it refuses."""

import copy

import pytest
import torch
from small_training import make_trainer, small_model
from torch import nn

from repkern.train import StructureChanged
from repkern.train.ema import MovingAverage
from repkern.train.recipe import EMARecipe


def moved(model, amount):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_the_formula(warmup, every):
    model = small_model().double()
    average = MovingAverage(model, EMARecipe(decay=0.8, every=every, warmup=warmup))
    average.attach(model)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(1, 7):
        moved(model, 0.5 * step)
        average.update(step)
        if step % every == 0:
            updates = step // every
            decay = min(0.8, (1 + updates) / (10 + updates)) if warmup else 0.8
            for name, p in model.named_parameters():
                wanted[name] = decay * wanted[name] + (1 - decay) * p.detach()
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, wanted[name], rtol=1e-12, atol=1e-12)


def test_statistics_of_norms_are_those_of_the_model():
    trainer = make_trainer(ema={"decay": 0.5})
    trainer.fit()
    own, average = dict(trainer.model.named_buffers()), dict(trainer.average.module.named_buffers())
    assert own.keys() == average.keys()
    assert all(torch.equal(own[name], average[name]) for name in own)
    assert not torch.equal(trainer.model[3].weight, trainer.average.module[3].weight)


def test_a_buffer_that_is_assigned_anew_is_followed():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.register_buffer("seen", torch.zeros(1))

    model = Counting()
    average = MovingAverage(model, EMARecipe())
    average.attach(model)
    model.seen = model.seen + 3
    average.update(1)
    assert average.module.seen.item() == 3


def test_it_is_tested_without_gradients_in_eval_mode_and_by_the_trainer():
    trainer = make_trainer(ema={"decay": 0.9})
    trainer.fit()
    assert not any(module.training for module in trainer.average.module.modules())
    assert not any(p.requires_grad for p in trainer.average.module.parameters())
    of_average = trainer.evaluate()
    trainer.average.module.load_state_dict(trainer.model.state_dict())
    of_weights = trainer.evaluate()
    trainer.average = None
    assert trainer.evaluate() == of_weights != of_average


def test_another_structure_is_an_error_that_says_what_to_do():
    model = small_model()
    average = MovingAverage(model, EMARecipe())
    changed = copy.deepcopy(model)
    changed[2] = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(216))
    with pytest.raises(RuntimeError, match=r"differ in 2\.1\.bias, .*Trainer\.structure_changed"):
        average.attach(changed)


@pytest.mark.parametrize("replay", [False, True])
def test_it_follows_a_change(replay):
    def change(network):
        network[3] = nn.Linear(216, 10, bias=False)

    model = small_model()
    average = MovingAverage(model, EMARecipe(decay=0.5, warmup=False))
    kept = average.module[0][0].weight
    change(model)
    average.follow(model, StructureChanged(("3",), replay=change if replay else None))
    average.attach(model)
    assert average.module[0][0].weight is kept
    assert average.module[3] is not model[3]
    assert torch.equal(average.module[3].weight, model[3].weight) != replay
    assert not average.module[3].weight.requires_grad
    before = average.module[3].weight.clone()
    moved(model, 1.0)
    average.update(1)
    torch.testing.assert_close(average.module[3].weight, (before + model[3].weight) / 2)


def test_the_whole_network_can_be_another():
    model = small_model()
    average = MovingAverage(model, EMARecipe())
    other = small_model(seed=5)
    average.follow(other, StructureChanged(("",)))
    average.attach(other)
    assert all(torch.equal(a, b) for a, b in zip(average.module.parameters(), other.parameters(), strict=True))
