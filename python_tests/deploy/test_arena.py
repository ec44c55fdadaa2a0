"""Packed weights side by side in large pages: the same values, one piece of memory, copies and files included."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import repkern
from repkern.deploy import InferenceConv2d
from repkern.ops import _check
from repkern.ops._huge_pages import HUGE_PAGE, advise


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REPKERN_CACHE_DIR", str(tmp_path / "cache"))


X = torch.randn(1, 128, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fast(monkeypatch):
    forced = lambda calls, x: {name: 1.0 if name == "winograd F4" else 9.0 for name in calls}  # noqa: E731
    monkeypatch.setattr("repkern.deploy._choice.time_calls", forced)
    body = nn.Sequential(*[nn.Conv2d(128, 128, 3, padding=1) for _ in range(5)]).requires_grad_(False)
    return repkern.optimize_for_inference(body, X, cache=False)


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, InferenceConv2d)]


def test_all_layers_share_one_piece_of_memory(fast):
    starts = [layer.packed.data_ptr() for layer in layers(fast)]
    assert len({layer.packed.untyped_storage().data_ptr() for layer in layers(fast)}) == 1
    assert starts[0] % HUGE_PAGE == 0
    assert all(after - before == 128 * 128 * 9 * 4 for before, after in itertools.pairwise(starts))


def test_values_survive_moving_copying_and_files(fast):
    wanted = fast(X)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(X), wanted)
        assert len({layer.packed.untyped_storage().data_ptr() for layer in layers(other)}) == 1
    state = {name: value.clone() for name, value in fast.state_dict().items()}
    fast.load_state_dict({name: value + 1 for name, value in state.items()})
    assert not torch.equal(fast(X), wanted)
    fast.load_state_dict(state)
    assert torch.equal(fast(X), wanted)


@pytest.mark.parametrize("size", [1, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_workspaces_are_aligned(size):
    space = _check.workspace(size, torch.device("cpu"))
    assert space.nbytes >= size
    assert space.data_ptr() % (64 if size < HUGE_PAGE else HUGE_PAGE) == 0


def test_small_memory_is_left_alone():
    small = torch.arange(10)
    advise(small.data_ptr(), small.nbytes)
    assert torch.equal(small, torch.arange(10))
