"""Folders and disks that go wrong, for real: damaged files, full and read-only file systems, size limits."""

import contextlib
import json
import os
import subprocess

import pytest
from small_training import EPOCHS, STEPS, At, Notes, assert_same, make_trainer

from repkern.train import CheckpointError, DamagedCheckpointError
from repkern.train.metrics import read_rows

EVERY = {"checkpoint": {"every_steps": 4, "keep": 3}}


def newest(folder):
    return sorted((folder / "checkpoints").glob("step_*"))[-1]


def trained(folder, steps=2 * STEPS):
    make_trainer(folder, train={"max_steps": steps}, ema={"decay": 0.9}, **EVERY).fit()
    return newest(folder)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: path.write_bytes(b""), os.remove])
@pytest.mark.parametrize(
    "name", ["manifest.json", "structure.json", "weights.safetensors", "average.safetensors", "state.pt"]
)
def test_a_damaged_newest_one_is_named_and_the_one_before_used(tmp_path, name, damage):
    damaged = trained(tmp_path)
    damage(damaged / name)
    notes = Notes()
    resumed = make_trainer(tmp_path, train={"max_steps": 2 * STEPS}, ema={"decay": 0.9}, callbacks=[notes], **EVERY)
    assert resumed.resume().step == 8
    assert len(notes.texts) == 1
    assert damaged.name in notes.texts[0]
    assert "step 8 is used, and the damaged one set aside" in notes.texts[0]
    assert not damaged.exists()
    resumed.fit()
    whole = make_trainer(train={"max_steps": 2 * STEPS}, ema={"decay": 0.9})
    whole.fit()
    assert_same(whole, resumed)
    assert read_rows(tmp_path) == resumed.rows


def test_with_one_kept_a_damaged_one_does_not_cost_the_next(tmp_path):
    """It must not count as the newest that is kept, or what is written after it would be deleted at once."""
    options = {"train": {"max_steps": 10}, "checkpoint": {"every_steps": 4, "keep": 1, "best": False}}
    make_trainer(tmp_path, train={"max_steps": 10}, checkpoint={"every_steps": 4, "keep": 2, "best": False}).fit()
    flip_a_bit(newest(tmp_path) / "state.pt")
    resumed = make_trainer(tmp_path, **options)
    assert resumed.resume().step == 8
    resumed.fit()
    assert newest(tmp_path).name == "step_00000010"
    assert make_trainer(tmp_path, **options).resume().step == 10


def test_when_all_are_damaged_none_is_used_nor_set_aside(tmp_path):
    trained(tmp_path)
    folders = sorted((tmp_path / "checkpoints").glob("step_*"))
    for folder in folders:
        flip_a_bit(folder / "weights.safetensors")
    with pytest.raises(DamagedCheckpointError, match=rf"{folders[-1].name}.*so are {len(folders) - 1} before it"):
        make_trainer(tmp_path, train={"max_steps": 2 * STEPS}, ema={"decay": 0.9}, **EVERY).resume()
    assert sorted((tmp_path / "checkpoints").glob("step_*")) == folders


def test_another_version_is_an_error_and_not_passed_over(tmp_path):
    path = trained(tmp_path) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 3}))
    with pytest.raises(CheckpointError, match="version 3, this reads"):
        make_trainer(tmp_path, train={"max_steps": 2 * STEPS}, ema={"decay": 0.9}, **EVERY).resume()


def test_what_a_killed_process_left_is_tidied(tmp_path):
    path = trained(tmp_path)
    os.rename(path, path.with_name(f".{path.name}.123.old"))  # killed between the two renames
    (path.parent / ".step_00000099.123.tmp").mkdir()
    trainer = make_trainer(tmp_path, train={"max_steps": 2 * STEPS}, ema={"decay": 0.9}, **EVERY)
    assert trainer.resume().step == 2 * STEPS
    assert not list(path.parent.glob(".*"))


@contextlib.contextmanager
def mounted(folder, *options):
    """A file system of its own at `folder`; skips where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "repkern-test", str(folder)]
    try:
        result = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount")
    if result.returncode:
        pytest.skip(f"a file system cannot be mounted here: {result.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_does_not_end_a_run_nor_cost_what_was_saved(tmp_path):
    """It fills up in the second epoch and has room again in the third."""
    notes = Notes()
    with mounted(tmp_path / "disk", "size=2m") as disk:

        def fill(trainer):
            with contextlib.suppress(OSError), (disk / "filler").open("wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()

        def empty(trainer):
            assert [path.name for path in sorted((disk / "run" / "checkpoints").iterdir())] == ["step_00000006"]
            assert make_trainer(disk / "run").resume().step == STEPS
            (disk / "filler").unlink()

        changes = [At(STEPS + 1, fill), At(2 * STEPS + 1, empty, "on_gradients")]
        trainer = make_trainer(disk / "run", callbacks=[notes, *changes])
        state = trainer.fit()
        assert len(state) == EPOCHS
        assert newest(disk / "run").name == "step_00000018"
        assert len(read_rows(disk / "run")) == EPOCHS
    failed = [text for text in notes.texts if "step_00000012" in text]
    assert len(failed) == 1
    assert "the disk is full: make room, or write elsewhere" in failed[0]
    assert "Training goes on, and it will be tried again" in failed[0]


def test_a_disk_that_becomes_read_only_does_not_end_a_run(tmp_path):
    notes = Notes()
    with mounted(tmp_path / "disk", "size=2m") as disk:

        def remount(mode):
            return lambda trainer: subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)

        changes = [At(STEPS + 1, remount("ro")), At(2 * STEPS + 1, remount("rw"))]
        trainer = make_trainer(disk / "run", callbacks=[notes, *changes])
        assert len(trainer.fit()) == EPOCHS
        assert newest(disk / "run").name == "step_00000018"
    assert any("step_00000012" in text and "read-only" in text for text in notes.texts)


def test_a_read_only_folder_is_known_before_the_first_step(tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk, pytest.raises(OSError, match="read-only: write elsewhere"):
        make_trainer(disk / "run")
    with mounted(tmp_path / "other", "size=1m") as disk:
        trainer = make_trainer(disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be written: .*read-only"):
            trainer.fit()
        assert trainer.step == 0


def test_a_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "run").write_text("no folder")
    with pytest.raises(OSError, match="run cannot be written"):
        make_trainer(tmp_path / "run")


def test_a_limit_on_the_size_of_files_is_named(tmp_path, worker):
    """Here the weights are written by a library that reports errors in its own way."""
    lines = worker.run(tmp_path, then="limit")
    assert lines[-1] == "done at 18, None"
    failed = [line for line in lines if line.startswith("note")]
    assert len(failed) == 6  # after steps 4, 6, 8, 12, 16 and 18
    assert "step_00000004 cannot be written: the file would be larger than is allowed here" in failed[0]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_rows_survive_when_the_log_cannot_be_written(tmp_path):
    """A folder in the place of the log: each epoch says so, and the rows are in the checkpoint."""

    def block(trainer):
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").mkdir()

    notes = Notes()
    trainer = make_trainer(tmp_path, callbacks=[notes, At(2, block)])
    trainer.fit()
    assert len([text for text in notes.texts if "metrics.jsonl" in text]) == EPOCHS
    (tmp_path / "metrics.jsonl").rmdir()
    again = make_trainer(tmp_path)
    again.resume()
    assert read_rows(tmp_path) == trainer.rows == again.rows
