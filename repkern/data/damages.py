"""Missing and damaged images: counted, reported, and too many at some point."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

from repkern.data.errors import DamagedImagesError, DamagedImagesWarning
from repkern.data.reading import Damage, Part

__all__ = ["Damages"]

_NAMED = 3


class Damages:
    """What could not be read, each image once. With `on_error` "fail" the first one is an error.

    With "skip", it is an error when more than `share` of the images of a part are damaged.
    """

    def __init__(self, sizes: dict[Part, int], on_error: Literal["skip", "fail"], share: float) -> None:
        if on_error not in ("skip", "fail"):
            raise ValueError(f"on_error must be 'skip' or 'fail', got {on_error!r}")
        if not 0 <= share <= 1:
            raise ValueError(f"damaged_share must be in [0, 1], got {share}")
        self._sizes, self._fails, self._share = sizes, on_error == "fail", share
        self._found: dict[Part, dict[int, str]] = {"train": {}, "test": {}}
        self._said: dict[Part, int] = {"train": 0, "test": 0}

    def counts(self) -> dict[Part, int]:
        """How many images of each part could not be read so far."""
        return {part: len(found) for part, found in self._found.items()}

    def add(self, damaged: Sequence[Damage]) -> None:
        """Count images. DamagedImagesError when there are too many."""
        for each in damaged:
            self._found[each.part].setdefault(each.sample, each.text)
        for part in {each.part for each in damaged}:
            if self._fails or len(self._found[part]) > self._share * self._sizes[part]:
                allowed = "none may be (on_error: fail)" if self._fails else f"at most {self._share:.2%} may be"
                raise DamagedImagesError(f"{self._text(part)}; {allowed}")

    def say(self, part: Part, *, instead: str, more: bool = False) -> None:
        """Warn of the first images that could not be read; with `more`, also when there are more than was said."""
        found, said = len(self._found[part]), self._said[part]
        if found > said and (more or said == 0):
            self._said[part] = found
            warnings.warn(f"{self._text(part)}; {instead}", DamagedImagesWarning, stacklevel=3)

    def _text(self, part: Part) -> str:
        found = list(self._found[part].values())
        named = "; ".join(found[:_NAMED]) + ("; ..." if len(found) > _NAMED else "")
        return f"{len(found)} of {self._sizes[part]} {part} images cannot be read: {named}"
