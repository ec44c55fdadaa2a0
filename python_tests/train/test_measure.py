import time

import pytest
import torch
from torch import nn

from repkern.train.measure import median_times, paired_times, peak_memory, resident_bytes

MIB = 2**20


def test_actions_take_turns():
    calls = []
    paired_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert "".join(calls) == "abbaabba"


def test_times_are_those_of_the_action():
    times = paired_times({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, rounds=3, warmup=0)
    assert [len(values) for values in times.values()] == [3, 3]
    median = median_times(times)
    assert median["slow"] >= 0.02
    assert median["fast"] < 0.02


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_impossible_counts_are_named(rounds, warmup):
    with pytest.raises(ValueError, match=f"got {rounds} and {warmup}"):
        paired_times({}, rounds=rounds, warmup=warmup)


def test_peak_is_the_most_that_lived_at_once(capfd):
    def action():
        one = torch.empty(MIB, dtype=torch.uint8)
        two = torch.empty(2 * MIB, dtype=torch.uint8)
        del one
        three = torch.empty(4 * MIB, dtype=torch.uint8)
        del two, three
        torch.empty(3 * MIB, dtype=torch.uint8)

    assert peak_memory(action) == 6 * MIB
    assert peak_memory(action) == 6 * MIB
    assert capfd.readouterr().err == ""


def test_standard_error_works_again_afterwards(capfd):
    import os

    def broken():
        torch.empty(8)
        raise ValueError("in the action")

    with pytest.raises(ValueError, match="in the action"):
        peak_memory(broken)
    os.write(2, b"heard")
    assert capfd.readouterr().err.endswith("heard")


def test_resident_counts_every_storage_once():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    model[1].weight = model[0].weight
    assert resident_bytes(model) == 400
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 10)).sum().backward()
    assert resident_bytes(model, optimizer) == 800
    optimizer.step()
    assert resident_bytes(model, optimizer) == 1200
