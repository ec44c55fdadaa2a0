"""Files that are either the old version or the new one, never half of one."""

from __future__ import annotations

import os
from pathlib import Path

from repkern.models.files import replaced

__all__ = ["flush_folder", "write_atomically"]


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at `path` by `text`; a crash at any moment leaves the old file or the new one.

    OSError with the path and what to do when it cannot be written.
    """
    with replaced(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def flush_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
