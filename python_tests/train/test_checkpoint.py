"""Checkpoint folders: what is written is read back or named as damaged, and what a killed process leaves is tidied."""

import json
import os

import pytest
import torch
from torch import nn

from repkern.train import CheckpointError, CheckpointFolder, DamagedCheckpointError
from repkern.train.checkpoint import Checkpoint

FILES = ("structure.json", "weights.safetensors", "average.safetensors", "state.pt")


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints")


def checkpoint(value=1.0, *, average=True, metric=None, epoch=None, state=None):
    weights = {"weight": torch.full((3, 2), value), "count": torch.tensor(5)}
    return Checkpoint(
        structure={"changes": {}},
        weights=weights,
        average={name: tensor.clone() for name, tensor in weights.items()} if average else None,
        state={"position": [1, 2, 3], "value": value, "tensor": torch.arange(3)} if state is None else state,
        notes={"metric": metric, "epoch": epoch},
    )


def names(folder):
    return sorted(path.name for path in folder.folder.iterdir())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("average", [True, False])
def test_round_trip(folder, average):
    written = checkpoint(average=average, metric=0.5, epoch=2)
    path = folder.save(7, written)
    found = folder.load(7)
    assert path == folder.path(7) == folder.folder / "step_00000007"
    assert (found.structure, dict(found.notes)) == (written.structure, {"metric": 0.5, "epoch": 2})
    assert found.state["value"] == 1.0
    assert torch.equal(found.state["tensor"], torch.arange(3))
    for one, other in ((found.weights, written.weights), (found.average, written.average)):
        assert one is other is None or all(torch.equal(one[name], other[name]) for name in other)


def test_tensors_that_share_memory_or_are_views_are_written(folder):
    base = torch.arange(12.0).reshape(3, 4)
    weights = {"a": base, "b": base, "row": base[1], "turned": base.t(), "last": torch.ones(2, 3, 4, 4)}
    weights["last"] = weights["last"].to(memory_format=torch.channels_last)
    folder.save(1, Checkpoint({}, weights, None, {}, {}))
    found = folder.load(1).weights
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_the_newest_those_of_every_nth_epoch_and_the_best_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2, keep_every=3)
    for epoch, metric in enumerate([0.1, 0.9, 0.2, 0.9, 0.3, None, float("nan"), 0.4], start=1):
        folder.save(10 * epoch, checkpoint(metric=metric, epoch=epoch))
    assert folder.best() == 20
    assert folder.steps() == [20, 30, 60, 70, 80]
    assert names(folder) == [f"step_{step:08d}" for step in folder.steps()]


def test_without_best_only_the_newest_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1, best=False)
    for step in (1, 2, 3):
        folder.save(step, checkpoint(metric=-step))
    assert folder.steps() == [3]


def test_what_was_just_written_is_kept_even_below_a_later_one(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1, best=False)
    folder.save(9, checkpoint())
    folder.save(4, checkpoint())
    assert folder.steps() == [4, 9]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "bytes, .* were written"),
        (empty, "0 bytes, .* were written"),
        (flip_a_bit, "SHA-256"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_damage_names_the_file(folder, name, damage, message):
    folder.save(1, checkpoint())
    damage(folder.path(1) / name)
    with pytest.raises(DamagedCheckpointError, match=f"{name}.*{message}"):
        folder.load(1)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"files": 3}', "[" * 100_000, "\x00", '{"format": "x", "files": []}']
)
def test_a_damaged_manifest_is_an_error(folder, text):
    folder.save(1, checkpoint())
    (folder.path(1) / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is damaged or not from repkern"):
        folder.load(1)


def test_a_manifest_without_one_of_the_files_is_damaged(folder):
    folder.save(1, checkpoint())
    path = folder.path(1) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["state.pt"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=r"does not name state\.pt"):
        folder.load(1)


def test_a_foreign_folder_is_an_error(folder):
    folder.path(1).mkdir(parents=True)
    (folder.path(1) / "model.pt").write_bytes(b"something")
    with pytest.raises(DamagedCheckpointError, match=r"not a checkpoint of repkern"):
        folder.load(1)


@pytest.mark.parametrize(("name", "value"), [("version", 99), ("version", 1), ("format", "other")])
def test_another_version_is_not_damage(folder, name, value):
    folder.save(1, checkpoint())
    path = folder.path(1) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(CheckpointError, match=f"{value}.*this reads 'repkern.checkpoint' version 2") as caught:
        folder.load(1)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_code_is_never_unpickled(folder):
    class Payload:
        def __reduce__(self):
            return (pytest.fail, ("a pickle in a checkpoint was executed",))

    folder.save(1, checkpoint(state={"payload": Payload()}))
    with pytest.raises(DamagedCheckpointError, match=r"cannot be read"):
        folder.load(1)


def test_the_same_step_again_replaces_it_and_leaves_nothing_behind(folder):
    folder.save(1, checkpoint(1.0))
    folder.save(1, checkpoint(2.0))
    assert folder.load(1).state["value"] == 2.0
    assert names(folder) == ["step_00000001"]


def test_tidy_undoes_what_a_kill_between_the_two_renames_left(folder):
    folder.save(1, checkpoint(1.0))
    os.rename(folder.path(1), folder.folder / ".step_00000001.123.old")
    (folder.folder / ".step_00000001.123.tmp").mkdir()
    (folder.folder / ".step_00000001.123.tmp" / "weights.safetensors").write_bytes(b"half")
    folder.tidy()
    assert names(folder) == ["step_00000001"]
    assert folder.load(1).state["value"] == 1.0


def test_tidy_removes_the_old_one_when_the_new_one_is_in_place(folder):
    folder.save(1, checkpoint(1.0))
    os.rename(folder.path(1), folder.folder / ".step_00000001.123.old")
    folder.save(1, checkpoint(2.0))
    folder.tidy()
    assert names(folder) == ["step_00000001"]
    assert folder.load(1).state["value"] == 2.0


def test_a_failure_in_the_middle_leaves_what_was_there(folder):
    folder.save(1, checkpoint(1.0))
    with pytest.raises(AttributeError):  # a local function cannot be pickled: it fails after the weights are written
        folder.save(1, checkpoint(2.0, state={"function": lambda: 2}))
    assert folder.load(1).state["value"] == 1.0
    assert names(folder) == ["step_00000001"]


def test_a_folder_that_is_a_file_is_said(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="step_00000001 cannot be written"):
        CheckpointFolder(tmp_path / "file").save(1, checkpoint())


def test_set_aside_keeps_the_files_and_hides_the_step(folder):
    folder.save(1, checkpoint())
    for _ in range(2):
        folder.save(2, checkpoint())
        folder.set_aside(2)
    assert folder.steps() == [1]
    assert names(folder) == ["damaged_step_00000002", "step_00000001"]
    assert (folder.folder / "damaged_step_00000002" / "state.pt").is_file()


def test_other_names_are_no_steps(folder):
    folder.save(3, checkpoint())
    for name in ("step_x", "step_", "step_4.tmp", "epoch_0001"):
        (folder.folder / name).mkdir()
    assert folder.steps() == [3]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        CheckpointFolder(tmp_path, keep=0)


def test_weights_are_a_file_that_others_read(folder):
    from safetensors.torch import load_model

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 2))
            self.register_buffer("count", torch.tensor(0))

    folder.save(1, checkpoint(4.0))
    network = Network()
    load_model(network, str(folder.path(1) / "weights.safetensors"))
    assert network.weight[0, 0].item() == 4.0
