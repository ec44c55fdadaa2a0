"""Files that appear whole or not at all, and JSON from files that may hold anything."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

__all__ = ["explained", "parse_json", "replaced"]

_ADVICE = {
    errno.ENOSPC: "the disk is full: make room, or write elsewhere",
    errno.EDQUOT: "your quota of the disk is used up: make room, or write elsewhere",
    errno.EFBIG: "the file would be larger than is allowed here: write elsewhere",
    errno.EACCES: "no permission: write elsewhere, or change the folder's permissions",
    errno.EPERM: "not permitted: write elsewhere, or change the folder's permissions",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.ENAMETOOLONG: "the name is too long for this file system: choose a shorter one",
}


def parse_json(text: str | bytes) -> Any:
    """json.loads, with ValueError for everything that is wrong with a text: nested too deep, not UTF-8."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    A crash or an exception leaves what was at `path` before. The file gets the permissions of the one it replaces, or
    those of any new file. FileNotFoundError when its folder does not exist, IsADirectoryError when `path` is a folder,
    OSError (of the kind that the system gave) with the path and what to do when it cannot be written.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ValueError(f"a file name cannot contain a zero byte, got {str(path)!r}")
    with explained(path):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, a file name is needed")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"the folder {path.parent} does not exist")
        # Short, because a name that just fits must not become too long; the suffix stays, because exporters look at it.
        beside = hashlib.sha256(path.name.encode(errors="surrogateescape")).hexdigest()[:12]
        temporary = path.with_name(f".{beside}.{os.getpid()}.tmp{path.suffix}")
        try:
            temporary.touch()
            mode = (path if path.exists() else temporary).stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that only their owner reads
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            # What went wrong before matters more than a temporary file that cannot be removed.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the file system, and of libraries that met one, as OSError that names `path` and what to do."""
    try:
        yield
    except OSError as problem:
        if problem.errno is None:  # of ours: it says already what is wrong
            raise
        reason = _ADVICE.get(problem.errno, problem.strerror or str(problem))
        raise OSError(problem.errno, _text(path, reason)) from problem
    except (SafetensorError, RuntimeError) as problem:
        text = str(problem)
        if not isinstance(problem, SafetensorError) and "inline_container" not in text and "PytorchStream" not in text:
            raise
        number = next((code for code in _ADVICE if os.strerror(code) in text), errno.EIO)
        reason = _ADVICE.get(number, "the disk may be full or failing: make room, or write elsewhere")
        raise OSError(number, _text(path, f"{reason} ({text.splitlines()[0]})")) from problem


def _text(path: Path, reason: str) -> str:
    shown = str(path) if len(path.name) < 120 else f"{path.parent / path.name[:60]}...({len(path.name)} characters)"
    return f"{shown} cannot be written: {reason}. What was there before is kept"
