"""Draws by counter: the published generator, the same for a sample wherever it is read, and evenly spread."""

import numpy
import pytest
import torch

from repkern.data.draws import Draws, epoch_order, philox


def words(*values):
    return tuple(numpy.array([value], dtype=numpy.uint64) for value in values)


# Known answers of Philox 4x32-10, as the authors' library Random123 states them.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_generator_gives_the_published_answers(counter, key, expected):
    assert tuple(philox(words(*counter), key)[0]) == expected


def test_a_sample_gets_the_same_draws_in_every_batch_and_count():
    whole = Draws(3, 5, torch.arange(100)).uniform(7, 9)
    assert whole.shape == (100, 9)
    assert whole.dtype == torch.float32
    chosen = torch.tensor([42, 7, 99])
    assert torch.equal(Draws(3, 5, chosen).uniform(7, 9), whole[chosen])
    assert torch.equal(Draws(3, 5, chosen).uniform(7, 2), whole[chosen, :2])


def test_every_word_of_the_position_matters():
    samples = torch.arange(64)
    base = Draws(1, 1, samples).uniform(1, 4)
    for other in (
        Draws(2, 1, samples).uniform(1, 4),
        Draws(1, 2, samples).uniform(1, 4),
        Draws(1, 1, samples).uniform(2, 4),
    ):
        assert (base != other).float().mean() > 0.99


def test_draws_are_even_and_independent():
    draws = Draws(0, 0, torch.arange(100_000)).uniform(0, 2).double()
    assert draws.min() >= 0
    assert draws.max() < 1
    expected = 100_000 / 20  # chi squared of 19 degrees is below 45 with p = 0.9993, and the draws are fixed
    for column in draws.T:
        counts = torch.histc(column, bins=20, min=0, max=1)
        assert ((counts - expected) ** 2 / expected).sum() < 45
    other = Draws(0, 1, torch.arange(100_000)).uniform(0, 1).double()[:, 0]
    for a, b in ((draws[:, 0], draws[:, 1]), (draws[:, 0], other), (draws[:-1, 0], draws[1:, 0])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.015


def test_order_is_a_permutation_of_its_own_for_each_epoch_and_seed():
    first = epoch_order(0, 0, 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, epoch_order(0, 0, 1000))
    for other in (epoch_order(0, 1, 1000), epoch_order(1, 0, 1000)):
        assert (first == other).sum() < 20
    assert epoch_order(0, 0, 8).tolist() == [4, 6, 5, 7, 0, 3, 1, 2]  # runs made earlier resume as they were


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Draws(-1, 0, torch.arange(2)), "seed must be in .* got -1"),
        (lambda: Draws(0, 2**32, torch.arange(2)), f"epoch must be in .* got {2**32}"),
        (lambda: Draws(0, 0, torch.tensor([-3])), "samples must be in .* got -3"),
        (lambda: Draws(0, 0, torch.arange(2)).uniform(2**32 - 1), "stream must be in"),
        (lambda: Draws(0, 0, torch.arange(2)).uniform(0, 0), "count must be at least 1, got 0"),
    ],
)
def test_bad_values_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_no_samples_give_no_draws():
    assert Draws(0, 0, torch.arange(0)).uniform(0, 3).shape == (0, 3)
    assert epoch_order(0, 0, 0).tolist() == []
