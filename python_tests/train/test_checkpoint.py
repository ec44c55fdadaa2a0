import json

import pytest
import torch
from torch import nn

from repkern.train import CheckpointError, CheckpointFolder


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints")


def make_model(features=3):
    return nn.Sequential(nn.Linear(features, 4), nn.BatchNorm1d(4))


def test_round_trip(folder):
    model, state = make_model(), {"epoch": 1, "numbers": [1, 2.5], "tensor": torch.arange(3)}
    folder.save(1, model, state)
    other = make_model()
    loaded = folder.load(1, other)
    assert loaded["numbers"] == [1, 2.5]
    assert torch.equal(loaded["tensor"], torch.arange(3))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_shared_weights_stay_shared(folder):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    folder.save(1, model, {})
    other = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    other["b"].weight = other["a"].weight
    folder.load(1, other)
    assert other["a"].weight is other["b"].weight
    assert torch.equal(other["a"].weight, model["a"].weight)


def test_only_the_newest_are_kept(folder):
    for epoch in range(1, 5):
        folder.save(epoch, make_model(), {})
    assert folder.epochs() == [3, 4]
    assert sorted(path.name for path in folder.folder.iterdir()) == ["epoch_0003", "epoch_0004"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_an_older_checkpoint_survives_a_damaged_newer_one(folder):
    old = make_model()
    folder.save(1, old, {})
    folder.save(2, make_model(), {})
    truncate(folder.path(2) / "state.pt")
    with pytest.raises(CheckpointError):
        folder.load(2, make_model())
    again = make_model()
    folder.load(1, again)
    assert torch.equal(again[0].weight, old[0].weight)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "bytes, .* were written"), (flip_a_bit, "SHA-256"), (lambda path: path.unlink(), "is missing")],
)
def test_damage_is_an_error_that_leaves_the_model_alone(folder, name, damage, message):
    folder.save(1, make_model(), {"epoch": 1})
    damage(folder.path(1) / name)
    model = make_model()
    before = model[0].weight.clone()
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        folder.load(1, model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "x", "version": 1, "files": []}'])
def test_a_damaged_manifest_is_an_error(folder, text):
    folder.save(1, make_model(), {})
    (folder.path(1) / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged or not from repkern"):
        folder.load(1, make_model())


def test_a_foreign_folder_is_an_error(folder):
    folder.path(1).mkdir(parents=True)
    (folder.path(1) / "model.pt").write_bytes(b"something")
    with pytest.raises(CheckpointError, match=r"no checkpoint of repkern"):
        folder.load(1, make_model())


@pytest.mark.parametrize(("name", "value"), [("version", 99), ("format", "other")])
def test_another_format_is_an_error(folder, name, value):
    folder.save(1, make_model(), {})
    path = folder.path(1) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(CheckpointError, match=f"{value}"):
        folder.load(1, make_model())


@pytest.mark.parametrize("other", [make_model(5), nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4))])
def test_another_model_is_an_error_that_leaves_it_alone(folder, other):
    folder.save(1, make_model(), {})
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="does not fit this model"):
        folder.load(1, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_code_is_never_unpickled(folder, monkeypatch):
    class Payload:
        def __reduce__(self):
            return (pytest.fail, ("a pickle in a checkpoint was executed",))

    folder.save(1, make_model(), {"payload": Payload()})
    with pytest.raises(CheckpointError, match=r"state.pt cannot be read"):
        folder.load(1, make_model())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("No space left on device")])
def test_a_failed_write_leaves_the_old_checkpoint(folder, monkeypatch, failure):
    old = make_model()
    folder.save(1, old, {})

    def broken_save(state, path):
        path.write_bytes(b"half of it")
        raise failure

    monkeypatch.setattr(torch, "save", broken_save)
    with pytest.raises(type(failure) if isinstance(failure, Exception) else failure):
        folder.save(2, make_model(), {})
    assert [path.name for path in folder.folder.iterdir()] == ["epoch_0001"]
    model = make_model()
    folder.load(1, model)
    assert torch.equal(model[0].weight, old[0].weight)


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        CheckpointFolder(tmp_path, keep=0)


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"files": 3}', "[" * 100_000, "\x00"])
def test_a_manifest_that_is_something_else_is_an_error(folder, text):
    folder.save(1, make_model(), {})
    (folder.path(1) / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        folder.load(1, make_model())


def test_the_same_epoch_again_replaces_it_and_leaves_nothing_behind(folder):
    first, second = make_model(), make_model()
    folder.save(1, first, {"which": 1})
    folder.save(1, second, {"which": 2})
    other = make_model()
    assert folder.load(1, other) == {"which": 2}
    assert torch.equal(other[0].weight, second[0].weight)
    assert [path.name for path in folder.folder.iterdir()] == ["epoch_0001"]


def test_what_cannot_be_written_is_said_and_older_checkpoints_stay(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="cannot be written"):
        CheckpointFolder(tmp_path / "file").save(1, make_model(), {})
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.save(1, make_model(), {"which": 1})
    with pytest.raises(AttributeError):  # a function inside cannot be pickled: it fails in the middle
        folder.save(1, make_model(), {"which": lambda: 2})
    assert folder.load(1, make_model()) == {"which": 1}
    assert [path.name for path in folder.folder.iterdir()] == ["epoch_0001"]
