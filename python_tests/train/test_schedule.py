import math

import pytest
import torch

from repkern.train.schedule import warmup_cosine


def rates(steps, warmup, resume_at=None):
    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        return optimizer, warmup_cosine(optimizer, steps, warmup)

    optimizer, schedule = make()
    found = []
    for step in range(steps):
        if step == resume_at:
            saved = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = make()
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found, optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_up_in_a_line_down_along_a_cosine(warmup):
    found, last = rates(20, warmup)
    for step, rate in enumerate(found):
        if step < warmup:
            wanted = 0.5 * (0.01 + 0.99 * step / warmup)
        else:
            wanted = 0.25 * (1 + math.cos(math.pi * (step - warmup) / (20 - warmup)))
        assert rate == pytest.approx(wanted, rel=1e-9)
    assert last == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("at", [2, 5, 12])
def test_a_resumed_schedule_goes_on_bit_for_bit(at):
    assert rates(20, 5, resume_at=at) == rates(20, 5)


@pytest.mark.parametrize(("steps", "warmup"), [(5, 5), (5, -1), (0, 0)])
def test_impossible_lengths_are_named(steps, warmup):
    with pytest.raises(ValueError, match=rf"in \[0, steps={steps}\), got {warmup}"):
        warmup_cosine(torch.optim.SGD([torch.zeros(1)], lr=0.5), steps, warmup)
