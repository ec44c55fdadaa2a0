"""Sums of files that torch writes as zip archives: their CRC-32, and a SHA-256 of ours over the whole file."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

__all__ = ["check_archive", "check_records", "seal_archive"]

_END = b"PK\x05\x06"  # of the record at a file's end, whose last field is the length of a comment
_END_SIZE = 22
_MARK = b"repkern sha256 "
_SEALED_SIZE = len(_MARK) + 64


def seal_archive(path: Path) -> None:
    """Append the SHA-256 of everything before as the archive's comment, which other programs pass over."""
    content = path.read_bytes()
    if content[-_END_SIZE:][: len(_END)] != _END:
        raise ValueError(f"{path} is no zip archive without a comment")
    content = content[:-2] + _SEALED_SIZE.to_bytes(2, "little")
    path.write_bytes(content + _MARK + hashlib.sha256(content).hexdigest().encode())


def check_archive(path: Path) -> None:
    """ValueError unless the file is as `seal_archive` left it; one without a comment of ours has its CRC-32 checked."""
    content = path.read_bytes()
    at = content.rfind(_MARK, -_SEALED_SIZE - len(_MARK))
    if at < 0:
        if not content.endswith(b"\0\0"):  # the length of the comment, which is none in older files
            raise ValueError("its end is not as it was written")
        check_records(path)
    elif content[at:] != _MARK + hashlib.sha256(content[:at]).hexdigest().encode():
        raise ValueError("it is not what was written (the SHA-256 sum differs)")


def check_records(path: Path) -> None:
    """ValueError when a file of torch.save has records whose CRC-32 is wrong. torch.load itself does not look at them.

    Where no record has the right one, the file was written without them (torch.serialization.set_crc32_options) and
    says nothing. Files of the format before zip have none.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        wrong: list[str] = []
        right = 0
        for record in archive.infolist():
            try:
                with archive.open(record) as content:
                    while content.read(1 << 22):
                        pass
                right += record.file_size > 0 and _is_content(record.filename)
            except zipfile.BadZipFile as problem:
                if "CRC" not in str(problem):
                    raise
                wrong.append(record.filename)
    if wrong and (right or not any(map(_is_content, wrong))):
        raise ValueError(f"the CRC-32 sum of {wrong[0]} differs")


def _is_content(record: str) -> bool:
    """Tensors and their names; the few bytes about the format have a sum in every file."""
    return "/data/" in record or record.endswith("/data.pkl")
