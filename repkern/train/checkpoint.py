"""Checkpoints of a training run: written whole or not at all, verified before anything is loaded from them.

One folder per checkpoint, named by its step: `structure.json` (in what the network differs from the one the run began
with), `weights.safetensors`, `average.safetensors` (with a moving average), `state.pt` (tensors and numbers only, read
without unpickling code), and last `manifest.json` with the sizes and SHA-256 sums of the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from repkern.models.files import explained, parse_json
from repkern.train.files import flush_folder

__all__ = ["Checkpoint", "CheckpointError", "CheckpointFolder", "DamagedCheckpointError"]

_FORMAT = "repkern.checkpoint"
_VERSION = 2
_NEEDED = ("structure.json", "weights.safetensors", "state.pt")
_AVERAGE = "average.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, incomplete, foreign, or belongs to another model or recipe. Nothing was loaded."""


class DamagedCheckpointError(CheckpointError):
    """The files of a checkpoint are not what was written; an earlier one may be whole."""


@dataclass(frozen=True)
class Checkpoint:
    """What one folder holds. notes: JSON values of the manifest (epoch, metric)."""

    structure: dict[str, Any]
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    state: dict[str, Any]
    notes: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of one run, `step_00000042` and so on.

    keep: so many of the newest stay; keep_every: and those at the end of every so many epochs, 0 for none; best: and
    the one whose notes have the highest "metric".
    """

    def __init__(self, folder: Path, *, keep: int = 2, keep_every: int = 0, best: bool = True) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = folder
        self._keep, self._keep_every, self._best = keep, keep_every, best

    def steps(self) -> list[int]:
        """The steps with a checkpoint, oldest first."""
        names = [path.name.removeprefix("step_") for path in self.folder.glob("step_*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is or would be."""
        return self.folder / f"step_{step:08d}"

    def tidy(self) -> None:
        """Remove what a killed process left half done. Call it only while no other process writes here."""
        for old in self.folder.glob(".step_*.old"):
            place = self.folder / old.name[1:].split(".")[0]
            if not place.exists():
                old.rename(place)
        for rest in [*self.folder.glob(".step_*.tmp"), *self.folder.glob(".step_*.old")]:
            shutil.rmtree(rest, ignore_errors=True)

    def save(self, step: int, checkpoint: Checkpoint) -> Path:
        """Write the checkpoint of `step`, then delete those that are not to be kept. Returns its folder.

        OSError with the path and what to do when it cannot be written; those that are there stay.
        """
        with explained(self.path(step)):
            self._save(step, checkpoint)
        for old in self._expendable(step):
            self._delete(old)
        return self.path(step)

    def set_aside(self, step: int) -> None:
        """Rename the damaged checkpoint of `step`, so that it neither counts nor is deleted."""
        with contextlib.suppress(OSError):  # in a read-only folder it stays
            aside = self.folder / f"damaged_{self.path(step).name}"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)

    def _delete(self, step: int) -> None:
        # Out of sight first: what a killed process leaves half deleted must not look like a checkpoint.
        gone = self.folder / f".{self.path(step).name}.{os.getpid()}.tmp"
        with contextlib.suppress(OSError):
            self.path(step).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _save(self, step: int, checkpoint: Checkpoint) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".step_{step:08d}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            files = _write(temporary, checkpoint)
            manifest = {"format": _FORMAT, "version": _VERSION, "step": step, "torch": torch.__version__}
            manifest["notes"] = dict(checkpoint.notes)
            manifest["files"] = {name: _fingerprint(temporary / name) for name in files}
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            _flush(temporary / "manifest.json")
            self._replace(step, temporary)
            flush_folder(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _replace(self, step: int, new: Path) -> None:
        """Put `new` in place; `tidy` undoes it when the process dies between the two renames."""
        before = new.with_suffix(".old")
        if self.path(step).exists():
            self.path(step).rename(before)
        try:
            new.rename(self.path(step))
        except BaseException:  # also a second Ctrl-C
            if before.exists() and not self.path(step).exists():
                before.rename(self.path(step))
            raise
        shutil.rmtree(before, ignore_errors=True)

    def _expendable(self, written: int) -> list[int]:
        """What is not to be kept, now that the checkpoint of step `written` is there."""
        steps = self.steps()
        notes = {step: self._notes(step) for step in steps}
        kept = {written, *steps[-self._keep :]}
        ended = {step: note["epoch"] for step, note in notes.items() if type(note.get("epoch")) is int}
        if self._keep_every:
            kept |= {step for step, epoch in ended.items() if epoch % self._keep_every == 0}
        if self._best:
            kept |= {step for step in (self.best(),) if step is not None}
        return [step for step in steps if step not in kept]

    def best(self) -> int | None:
        """The step with the highest metric in its notes, the earliest of equals; None when no checkpoint has one."""
        metrics = {step: self._notes(step).get("metric") for step in self.steps()}
        known = {
            step: metric for step, metric in metrics.items() if isinstance(metric, int | float) and metric == metric
        }
        return max(known, key=lambda step: (known[step], -step)) if known else None

    def _notes(self, step: int) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            notes = parse_json((self.path(step) / "manifest.json").read_text(encoding="utf-8"))["notes"]
            return notes if isinstance(notes, dict) else {}
        return {}

    def load(self, step: int) -> Checkpoint:
        """Read and verify the checkpoint of `step`.

        DamagedCheckpointError for one that is not as it was written, CheckpointError for one of another version.
        """
        folder = self.path(step)
        notes, names = _verify(folder)
        try:
            structure = parse_json((folder / "structure.json").read_text(encoding="utf-8"))
            weights = load_file(str(folder / "weights.safetensors"))
            average = load_file(str(folder / _AVERAGE)) if _AVERAGE in names else None
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # the readers have no common type for what can be wrong with a file
            raise DamagedCheckpointError(f"{folder} cannot be read: {error}") from error
        return Checkpoint(structure, weights, average, state, notes)


def _write(folder: Path, checkpoint: Checkpoint) -> list[str]:
    """Write and flush the files; returns their names."""
    (folder / "structure.json").write_text(json.dumps(checkpoint.structure, indent=2) + "\n", encoding="utf-8")
    save_file(_separate(checkpoint.weights), str(folder / "weights.safetensors"))
    torch.save(checkpoint.state, folder / "state.pt")
    names = list(_NEEDED)
    if checkpoint.average is not None:
        save_file(_separate(checkpoint.average), str(folder / _AVERAGE))
        names.append(_AVERAGE)
    for name in names:
        _flush(folder / name)
    return names


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two in one storage: what safetensors takes."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        if place in seen or own.numel() * own.element_size() != own.untyped_storage().nbytes():
            own = own.clone()
        seen.add(place)
        separate[name] = own
    return separate


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(file: Any) -> Any:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest


def _verify(folder: Path) -> tuple[dict[str, Any], set[str]]:
    """(notes, names of files); an error unless `folder` holds a checkpoint of ours, byte for byte as it was written."""
    path = folder / "manifest.json"
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        kind, version, files, notes = (manifest[key] for key in ("format", "version", "files", "notes"))
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{folder} is not a checkpoint of repkern: it has no manifest.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is damaged or not from repkern: {error!r}") from None
    if kind != _FORMAT or version != _VERSION:
        raise CheckpointError(
            f"{path} has format {kind!r} version {version}, this reads {_FORMAT!r} version {_VERSION}"
        )
    missing = [name for name in _NEEDED if name not in wanted]
    if missing:
        raise DamagedCheckpointError(f"{path} is damaged: it does not name {', '.join(missing)}")
    for name in (*_NEEDED, *([_AVERAGE] if _AVERAGE in wanted else [])):
        _compare(folder / name, *wanted[name])
    return notes if isinstance(notes, dict) else {}, set(wanted)


def _compare(file: Path, size: Any, digest: Any) -> None:
    if not file.is_file():
        raise DamagedCheckpointError(f"{file} is missing")
    found = _fingerprint(file)
    if found["bytes"] != size:
        raise DamagedCheckpointError(f"{file} is damaged: {found['bytes']} bytes, {size} were written")
    if found["sha256"] != digest:
        raise DamagedCheckpointError(f"{file} is damaged: its SHA-256 sum is not the one that was written")
