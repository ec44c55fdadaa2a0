"""Run folders: which one a command continues, which one it starts, and who is working in one right now."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from repkern.models.files import explained
from repkern.train.config import TrainConfig
from repkern.train.files import write_atomically

__all__ = ["Run", "RunError", "open_run"]

ConfigT = TypeVar("ConfigT", bound=TrainConfig)

_CONFIG = "config.json"
_SUMMARY = "summary.json"


class RunError(ValueError):
    """What was asked for does not go with the run folders that exist. The text says what would."""


@dataclass(frozen=True)
class Run(Generic[ConfigT]):
    """A folder that is ours until the end of the `with` block. `notes` are lines the user should see."""

    path: Path
    config: ConfigT
    resumed: bool
    notes: Sequence[str] = ()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, which makes the run a finished one."""
        write_atomically(self.path / _SUMMARY, json.dumps(summary, indent=2) + "\n")


@contextlib.contextmanager
def open_run(
    base: Path, config: ConfigT, mode: Literal["auto", "resume", "fresh"] = "auto", given: Sequence[str] = ()
) -> Iterator[Run[ConfigT]]:
    """Choose, make and lock a run folder: `base`, or `base-2`, `base-3`, ... when that is taken.

    auto: continue the newest run with the settings `config` if it is unfinished, else start a new one.
    resume: continue the newest unfinished run with the settings it has; RunError when there is none or when a setting
    named in `given` differs. fresh: start a new one. A run is finished when it has a summary.json.
    """
    base = base.absolute()
    if base.exists() and not base.is_dir():
        raise RunError(f"{base} is a file; a run needs a folder")
    notes: list[str] = []
    chosen = None
    if mode == "resume":
        chosen = _unfinished(base)
        config = _stored_settings(chosen, config, given)
    elif mode == "auto":
        chosen = _same_and_unfinished(base, config, notes)
    path = chosen or _next_free(base)
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if chosen is None:
            config.save(path / _CONFIG)
        yield Run(path, config, chosen is not None, notes)


def _existing(base: Path) -> list[Path]:
    """`base`, `base-2`, ... that are there, newest first."""
    pattern = re.compile(re.escape(base.name) + r"-([1-9][0-9]*)")
    numbers = [1] if base.is_dir() else []
    if base.parent.is_dir():
        matches = [pattern.fullmatch(path.name) for path in base.parent.iterdir() if path.is_dir()]
        numbers += [int(match[1]) for match in matches if match is not None and int(match[1]) > 1]
    return [_numbered(base, number) for number in sorted(numbers, reverse=True)]


def _numbered(base: Path, number: int) -> Path:
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def _next_free(base: Path) -> Path:
    number = 1
    while (path := _numbered(base, number)).exists() and any(path.iterdir()):
        number += 1
    return path


def _is_unfinished(path: Path) -> bool:
    return (path / _CONFIG).is_file() and not (path / _SUMMARY).exists()


def _unfinished(base: Path) -> Path:
    for path in _existing(base):
        if _is_unfinished(path):
            return path
    raise RunError(f"there is no unfinished run to resume at {base}")


def _stored_settings(path: Path, config: ConfigT, given: Sequence[str]) -> ConfigT:
    stored = type(config).load(path / _CONFIG)
    wrong = [name for name in given if getattr(stored, name) != getattr(config, name)]
    if wrong:
        has = ", ".join(f"{name} {getattr(stored, name)}, not {getattr(config, name)}" for name in wrong)
        raise RunError(f"the unfinished run {path} has {has}; leave that option out, or start anew with --fresh")
    return stored


def _same_and_unfinished(base: Path, config: ConfigT, notes: list[str]) -> Path | None:
    for path in _existing(base):
        if not (path / _CONFIG).is_file():
            continue
        try:
            differences = type(config).load(path / _CONFIG).differences(config)
        except ValueError as error:
            notes.append(f"Left alone: {error}")
            continue
        if not differences:
            return path if _is_unfinished(path) and not _is_locked(path) else None
        if _is_unfinished(path):
            notes.append(
                f"Left alone: the unfinished run {path.name} has {'; '.join(differences)} (--resume continues it)"
            )
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock; RunError when another process does. Without fcntl (Windows) there is no lock."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is working in {path}; wait for it, or choose another --out") from None
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _is_locked(path: Path) -> bool:
    try:
        with _locked(path):
            return False
    except RunError:
        return True
