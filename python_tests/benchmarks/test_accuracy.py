"""End-to-end accuracy of deployed networks, small here; benchmarks/accuracy.py runs the real size."""

import copy
import json

import pytest
from torch import nn

from repkern.bench import accuracy, targets
from repkern.bench.accuracy import AccuracyCase, Finding, accuracy_rows, compare
from repkern.nn import WinogradConv2d

TINY = AccuracyCase("repvgg_a0", images=6, size=32, width=0.125, chunk=4)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPKERN_CACHE_DIR", str(tmp_path))


def same(network, example):
    return network


def by_winograd(tile):
    """Every layer that can be is computed by F(tile x tile, 3x3), whatever is fastest."""

    def optimize(network, example):
        network = copy.deepcopy(network)
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.Conv2d) and module.stride == (1, 1) and module.kernel_size == (3, 3):
                parent, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(parent), leaf, WinogradConv2d.from_conv(module, tile))
        assert sum(isinstance(module, WinogradConv2d) for module in network.modules()) > 15
        return network

    return optimize


@pytest.mark.parametrize("how", ["optimized", 2, 4])
@pytest.mark.parametrize(
    "case",
    [
        AccuracyCase("repvgg_a0", images=48, size=64, width=0.5, chunk=16),
        AccuracyCase("repvgg_b1", images=16, size=96, width=0.25, chunk=16),
    ],
    ids=lambda case: case.model,
)
def test_logits_and_top_1_of_deployed_networks(case, how):
    found = compare(case, lambda text: None, optimize=None if how == "optimized" else by_winograd(how))["repkern"]
    assert found.images == case.images
    assert found.relative <= 1e-5
    assert found.agreeing == case.images


def test_errors_and_changed_classes_are_counted():
    def wrong(network, example):
        def run(images):
            logits = network(images)
            logits[0] *= 1 + 1e-3
            logits[1] = -logits[1]
            return logits

        return run

    found = compare(TINY, lambda text: None, optimize=wrong)
    assert found["repkern"].images == 6
    assert found["repkern"].worst == pytest.approx(2.0, rel=1e-3)
    assert found["repkern"].agreeing == 4  # one image of each chunk
    assert found["eager"].agreeing == 6
    rows = {(row.backend, row.what): row for row in accuracy_rows(TINY, found)}
    assert len(rows) == 6
    assert rows["repkern", "logits"].verdict.startswith("short by")
    assert rows["repkern", "top-1"].verdict == "short by 33.3 %"
    assert rows["repkern", "top-1"].ratio == pytest.approx(100 * 4 / 6)
    assert rows["eager", "logits"].target == ""
    assert rows["repkern", "worst image"].error_over_bound == pytest.approx(2e5, rel=1e-3)
    assert rows["repkern", "worst image"].target == ""


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    state, computed = tmp_path / "state" / "case.jsonl", []
    original = accuracy._findings

    def counted(networks, double, images):
        computed.append(len(images))
        return original(networks, double, images)

    monkeypatch.setattr(accuracy, "_findings", counted)
    whole = compare(TINY, lambda text: None, optimize=same)
    assert computed == [4, 2]
    computed.clear()

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(TINY, stop, optimize=same, state=state)
    with state.open("a") as file:
        file.write('{"first": 4, "ima')  # cut off
    said = []
    assert compare(TINY, said.append, optimize=same, state=state) == whole
    assert computed == [4, 2]
    assert said[-1].startswith("repvgg_a0: repkern 6/6 top-1, error ")
    assert compare(TINY, said.append, optimize=same, state=state) == whole
    assert computed == [4, 2]
    assert all(json.loads(line) for line in state.read_text().splitlines())


def test_more_images_use_what_is_there_and_another_case_begins_anew(tmp_path):
    state = tmp_path / "case.jsonl"
    first = compare(AccuracyCase("repvgg_a0", 4, 32, 4, 0.125), lambda text: None, optimize=same, state=state)
    lines = state.read_text().splitlines()
    assert compare(TINY, lambda text: None, optimize=same, state=state)["eager"].images == 6
    assert state.read_text().splitlines()[: len(lines)] == lines
    other = AccuracyCase("repvgg_a0", 4, 32, 4, 0.25)
    assert compare(other, lambda text: None, optimize=same, state=state) != first
    assert len(state.read_text().splitlines()) == 2


def test_findings_add_up():
    total = Finding(3, 0.5, 8.0, 0.5, 2) + Finding(2, 1.5, 24.0, 0.25, 2)
    assert total == Finding(5, 2.0, 32.0, 0.5, 4)
    assert total.relative == 0.25
    error, agreement = targets.accuracy_targets()
    assert (error.value, error.at_most, agreement.value, agreement.at_most) == (1e-5, True, 100.0, False)
