"""Where data sets are looked for, and how they get there."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

__all__ = ["cache_folder", "checked", "download", "first_with"]

_TIMEOUT = 60  # seconds without a byte
_BLOCK = 1 << 20


def cache_folder(name: str) -> Path:
    """Where a data set is downloaded to: in $REPKERN_CACHE_DIR, else in repkern/ of the user's cache folder."""
    own = os.environ.get("REPKERN_CACHE_DIR")
    if own:
        return Path(own) / "data" / name
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "repkern" / "data" / name


def first_with(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The first path that exists of `names` in `folders`, folder by folder."""
    return next((folder / name for folder in folders for name in names if (folder / name).exists()), None)


def download(url: str, to: Path, algorithm: str, expected: str) -> Path:
    """The file behind a URL as `to`, which appears when it is whole and has the expected sum.

    OSError when it cannot be had or written, ValueError for another sum; then there is no file.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=to.parent, prefix=f".{to.name}.", delete=False) as part:
        path = Path(part.name)
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
                shutil.copyfileobj(answer, part)
            part.flush()
            checked(path, algorithm, expected, url)
            path.chmod(0o644)
            path.replace(to)
        except OSError as problem:
            raise OSError(f"{url} could not be downloaded to {to}: {problem}") from problem
        finally:
            path.unlink(missing_ok=True)
    return to


def checked(path: Path, algorithm: str, expected: str, name: str) -> None:
    """ValueError when the file's sum is not the expected one (hexadecimal)."""
    total = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    found = total.hexdigest()
    if found != expected:
        raise ValueError(f"{name} has the {algorithm} sum {found}, expected {expected}: incomplete or changed")
