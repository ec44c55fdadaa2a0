"""Times that optimize_for_inference keeps between processes."""

import json
import warnings

import pytest
import torch
from torch import nn

import repkern
from repkern.deploy._cache import TimingCache, cache_file

x = torch.randn(2, 3, 20, 18, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REPKERN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr("repkern.deploy._choice.time_calls", lambda calls, x: dict.fromkeys(calls, 1.0))


@pytest.fixture
def model(randomize):
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
    return randomize(nn.Sequential(*layers))


def test_timing_for_real_and_the_cache(model, folder, monkeypatch):
    made = repkern.optimize_for_inference(model, x)
    assert all(seconds > 0 for layer in made.report.layers for seconds in layer.seconds.values())
    entries = json.loads(cache_file().read_text())["seconds"]
    assert cache_file().parent == folder
    assert len(entries) == 2  # the last two convolutions are alike

    def never(calls, x):
        raise AssertionError("what is known was timed again")

    monkeypatch.setattr("repkern.deploy._choice.time_calls", never)
    again = repkern.optimize_for_inference(model, x)
    assert [layer.method for layer in again.report.layers] == [layer.method for layer in made.report.layers]
    with pytest.raises(AssertionError, match="timed again"):
        repkern.optimize_for_inference(model, x, cache=False)
    with pytest.raises(AssertionError, match="timed again"):
        repkern.optimize_for_inference(model, x[:1])


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 1}', '{"format": 1, "seconds": {"a": {"torch": -1}}}', "\0"]
)
def test_a_broken_cache_is_ignored_and_replaced(model, untimed, folder, content):
    folder.mkdir()
    cache_file().write_text(content)
    with pytest.warns(UserWarning, match="is no cache of timings") as caught:
        repkern.optimize_for_inference(model, x)
    assert caught
    assert len(json.loads(cache_file().read_text())["seconds"]) == 2


def test_a_cache_of_another_version_is_left_alone_silently(model, untimed, folder):
    folder.mkdir()
    cache_file().write_text('{"format": 2, "other": 1}')
    repkern.optimize_for_inference(model, x)


def test_a_cache_that_cannot_be_written(model, untimed, folder):
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="timings could not be kept"):
        repkern.optimize_for_inference(model, x)


def test_two_processes_add_to_one_cache():
    one, other = TimingCache(), TimingCache()
    one.put("a", {"torch": 1.0})
    other.put("b", {"torch": 2.0})
    one.save()
    other.save()
    assert TimingCache().get("a") == {"torch": 1.0}
    assert TimingCache().get("b") == {"torch": 2.0}


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"format": 1, "seconds": {"a": {"torch": 1' + "0" * 400 + "}}}",
        '{"format": 1, "seconds": {"a": {"torch": "1"}}}',
        '{"format": 1, "seconds": [1]}',
    ],
)
def test_a_hostile_cache_never_fails(folder, content):
    folder.mkdir()
    cache_file().write_text(content)
    with pytest.warns(UserWarning, match="is no cache of timings"):
        assert TimingCache().get("a") == {}


def test_a_cache_whose_place_cannot_be_never_fails(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / ("n" * 300), tmp_path / "file" / "inside"):
        monkeypatch.setenv("REPKERN_CACHE_DIR", str(place))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = TimingCache()
            cache.put("a", {"torch": 1.0})
            cache.save()
        assert any("could not be kept" in str(warning.message) for warning in caught)


def test_a_folder_where_the_cache_should_be(folder):
    cache_file().mkdir(parents=True)
    with pytest.warns(UserWarning, match="is no cache of timings"):
        assert TimingCache().get("a") == {}
