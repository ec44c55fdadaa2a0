"""Learning rates against torch's own schedulers, and the closed forms of what torch lacks."""

import pytest
import torch
from torch.optim import lr_scheduler

from repkern.train.recipe import ScheduleRecipe
from repkern.train.schedule import Schedule, learning_rate_factor

PEAK = 0.4


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def ours(recipe, steps, steps_per_epoch=1):
    factor = learning_rate_factor(recipe, steps=steps, steps_per_epoch=steps_per_epoch)
    return [PEAK * factor(step) for step in range(steps)]


def theirs(make, steps):
    weights = optimizer()
    schedule = make(weights)
    rates = []
    for _ in range(steps):
        rates.append(weights.param_groups[0]["lr"])
        weights.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize(
    ("recipe", "make"),
    [
        ({"name": "cosine"}, lambda steps: lambda w: lr_scheduler.CosineAnnealingLR(w, steps)),
        (
            {"name": "cosine", "final": 0.1},
            lambda steps: lambda w: lr_scheduler.CosineAnnealingLR(w, steps, eta_min=0.1 * PEAK),
        ),
        ({"name": "poly", "power": 0.9}, lambda steps: lambda w: lr_scheduler.PolynomialLR(w, steps, 0.9)),
        ({"name": "poly", "power": 2.0}, lambda steps: lambda w: lr_scheduler.PolynomialLR(w, steps, 2.0)),
        ({"name": "linear"}, lambda steps: lambda w: lr_scheduler.LinearLR(w, 1.0, 0.0, steps)),
        (
            {"name": "step", "milestones": (2.0, 5.0, 5.0), "gamma": 0.5},
            lambda steps: lambda w: lr_scheduler.MultiStepLR(w, [2, 5, 5], 0.5),
        ),
        ({"name": "constant"}, lambda steps: lambda w: lr_scheduler.ConstantLR(w, 1.0, steps)),
    ],
)
def test_as_in_torch(recipe, make, steps):
    assert ours(ScheduleRecipe.model_validate(recipe), steps) == pytest.approx(theirs(make(steps), steps), abs=1e-12)


@pytest.mark.parametrize("steps", [4, 7, 30, 100])
def test_onecycle_is_that_of_torch(steps):
    def make(weights):
        return lr_scheduler.OneCycleLR(weights, PEAK, total_steps=steps, cycle_momentum=False)

    weights = optimizer()
    schedule = make(weights)
    rates = [weights.param_groups[0]["lr"]]
    for _ in range(steps - 1):
        weights.step()
        schedule.step()
        rates.append(weights.param_groups[0]["lr"])
    assert ours(ScheduleRecipe(name="onecycle"), steps) == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_onecycle_of_very_few_steps_is_defined(steps):
    assert all(0 < rate <= PEAK for rate in ours(ScheduleRecipe(name="onecycle"), steps))


@pytest.mark.parametrize("name", ["cosine", "poly", "linear", "step", "constant"])
def test_warm_up_is_a_line_and_then_the_schedule_of_the_steps_that_are_left(name):
    recipe = ScheduleRecipe(name=name, warmup_epochs=1.5, warmup_start=0.1, milestones=(3.0, 4.0))
    rates = ours(recipe, 40, steps_per_epoch=8)
    assert rates[:12] == pytest.approx([PEAK * (0.1 + 0.9 * step / 12) for step in range(12)])
    rest = ours(recipe.model_copy(update={"warmup_epochs": 0.0}), 28, steps_per_epoch=8)
    if name == "step":  # milestones count from the beginning of the training
        rest = [PEAK] * 12 + [0.1 * PEAK] * 8 + [0.01 * PEAK] * 8
    assert rates[12:] == pytest.approx(rest)


def test_a_warm_up_is_at_most_half_of_the_steps():
    rates = ours(ScheduleRecipe(warmup_epochs=100.0), 10)
    assert rates[5] == PEAK
    assert rates[4] < PEAK > rates[6]


def test_every_group_has_its_own_peak_and_a_later_one_joins():
    weights = optimizer()
    schedule = Schedule(weights, ScheduleRecipe(name="linear"), steps=10, steps_per_epoch=5)
    weights.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1, "initial_lr": 0.1})
    schedule.set(5)
    assert [group["lr"] for group in weights.param_groups] == pytest.approx([PEAK / 2, 0.05])
    assert schedule.rate(0) == PEAK


def test_a_rate_depends_on_the_step_alone():
    weights = optimizer()
    schedule = Schedule(weights, ScheduleRecipe(warmup_epochs=1.0), steps=20, steps_per_epoch=5)
    rates = {}
    for step in [*range(20), 13, 2, 7]:
        schedule.set(step)
        rate = weights.param_groups[0]["lr"]
        assert rates.setdefault(step, rate) == rate


@pytest.mark.parametrize(("steps", "steps_per_epoch"), [(0, 1), (1, 0), (-3, 5)])
def test_impossible_lengths_are_named(steps, steps_per_epoch):
    with pytest.raises(ValueError, match=f"at least 1, got {steps} and {steps_per_epoch}"):
        learning_rate_factor(ScheduleRecipe(), steps=steps, steps_per_epoch=steps_per_epoch)
