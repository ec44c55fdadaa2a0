import random

import numpy
import pytest
import torch

from repkern.train.reproducible import deterministic, random_state, restore_random_state, seed_everything


def draw():
    return (random.random(), random.gauss(0, 1), numpy.random.normal(), torch.randn(()).item())  # noqa: NPY002


def test_a_seed_fixes_every_generator():
    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert not set(draw()) & set(first)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_numpy_does_not_take_are_named(seed):
    with pytest.raises(ValueError, match=rf"seed must be in \[0, 2\*\*32\), got {seed}"):
        seed_everything(seed)


def test_the_state_survives_a_file_that_is_read_without_code(tmp_path):
    seed_everything(5)
    draw()  # an odd number of normals: numpy and Python then keep the second of a pair
    torch.save(random_state(), tmp_path / "state.pt")
    wanted = [draw(), draw()]
    seed_everything(8)
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw(), draw()] == wanted


def test_deterministic_is_in_force_and_then_put_back():
    torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    with deterministic(threads + 1):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.get_num_threads() == threads + 1
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
