"""Checkpoints of a training run: written whole or not at all, verified before anything is loaded from them.

One folder per checkpoint: `weights.safetensors` (the model), `state.pt` (tensors and numbers only, read without
unpickling code) and `manifest.json` with the sizes and SHA-256 sums of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from repkern.models.files import explained, parse_json
from repkern.train.files import flush_folder

__all__ = ["CheckpointError", "CheckpointFolder"]

_FORMAT = "repkern.checkpoint"
_VERSION = 1
_FILES = ("weights.safetensors", "state.pt")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, incomplete, foreign, or belongs to another model. Nothing was changed."""


class CheckpointFolder:
    """The checkpoints of one run, `epoch_0001` and so on. The newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = folder
        self._keep = keep

    def epochs(self) -> list[int]:
        """The epochs with a checkpoint, oldest first."""
        names = [path.name.removeprefix("epoch_") for path in self.folder.glob("epoch_*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, epoch: int) -> Path:
        """Where the checkpoint of `epoch` is or would be."""
        return self.folder / f"epoch_{epoch:04d}"

    def save(self, epoch: int, model: nn.Module, state: dict[str, Any]) -> None:
        """Write the checkpoint of `epoch`, then delete those beyond the newest `keep`.

        OSError with the path and what to do when it cannot be written; those that are there stay.
        """
        with explained(self.path(epoch)):
            self._save(epoch, model, state)
        for old in self.epochs()[: -self._keep]:
            shutil.rmtree(self.path(old))

    def _save(self, epoch: int, model: nn.Module, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".epoch_{epoch:04d}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            save_model(model, str(temporary / "weights.safetensors"), metadata={"epoch": str(epoch)})
            torch.save(state, temporary / "state.pt")
            for name in _FILES:
                _flush(temporary / name)
            manifest = {"format": _FORMAT, "version": _VERSION, "epoch": epoch, "torch": torch.__version__}
            manifest["files"] = {name: _fingerprint(temporary / name) for name in _FILES}
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            _flush(temporary / "manifest.json")
            # Left over when an earlier attempt went further than its metrics: the same epoch is computed again.
            before = temporary.with_suffix(".old")
            if self.path(epoch).exists():
                self.path(epoch).rename(before)
            try:
                temporary.rename(self.path(epoch))
            except OSError:
                if before.exists():
                    before.rename(self.path(epoch))
                raise
            shutil.rmtree(before, ignore_errors=True)
            flush_folder(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def load(self, epoch: int, model: nn.Module) -> dict[str, Any]:
        """Put the weights into `model` and return the state. Raises CheckpointError before touching the model."""
        folder = self.path(epoch)
        _verify(folder)
        try:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has no common type for what can be wrong with a file
            raise CheckpointError(f"{folder / 'state.pt'} cannot be read: {error}") from error
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            load_model(model, str(folder / "weights.safetensors"), strict=True)
        except Exception as error:
            model.load_state_dict(before)
            raise CheckpointError(f"{folder} does not fit this model: {error}") from error
        return state


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _verify(folder: Path) -> None:
    """CheckpointError unless `folder` holds a checkpoint of ours, byte for byte as it was written."""
    path = folder / "manifest.json"
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        kind, version, files = manifest["format"], manifest["version"], manifest["files"]
        wanted = {name: (files[name]["bytes"], files[name]["sha256"]) for name in _FILES}
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint of repkern: it has no manifest.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or not from repkern: {error!r}") from None
    if kind != _FORMAT or version != _VERSION:
        raise CheckpointError(
            f"{path} has format {kind!r} version {version}, this reads {_FORMAT!r} version {_VERSION}"
        )
    for name, (size, digest) in wanted.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        found = _fingerprint(file)
        if found["bytes"] != size:
            raise CheckpointError(f"{file} is damaged: {found['bytes']} bytes, {size} were written")
        if found["sha256"] != digest:
            raise CheckpointError(f"{file} is damaged: its SHA-256 sum is not the one that was written")
