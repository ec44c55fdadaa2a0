"""Which operations the policies choose from, and what a strength means for each.

A strength of 1 is the papers' magnitude 10; `sign` is -1 or 1.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["AUTOAUGMENT", "RANDAUGMENT", "TRIVIAL_WIDE", "Level"]

Level = Callable[[float, float], float]  # (strength, sign) -> argument of the operation

_SIDE = 224  # of the images that the side of a cutout was chosen for


def _signed(most: float) -> Level:
    return lambda strength, sign: sign * most * strength


def _about_one(most: float) -> Level:
    return lambda strength, sign: 1 + sign * most * strength


def _none(strength: float, sign: float) -> float:
    return 0.0


def _absolute(strength: float, sign: float) -> float:
    return 0.1 + 1.8 * strength  # 1 changes nothing: both ends are strong


def _bits_left(least: int) -> Level:
    return lambda strength, sign: 8 - round((8 - least) * strength)


def _threshold(strength: float, sign: float) -> float:
    return 256 * (1 - strength)


_ENHANCEMENTS = ("color", "contrast", "brightness", "sharpness")
_PLAIN = {"autocontrast": _none, "equalize": _none}


def _moves(degrees: float, shear: float, translate: float, kind: str = "translate") -> dict[str, Level]:
    return {
        "rotate": _signed(degrees),
        "shear_x": _signed(shear),
        "shear_y": _signed(shear),
        f"{kind}_x": _signed(translate),
        f"{kind}_y": _signed(translate),
    }


# AutoAugment (1805.09501), its table of operations and ranges. Posterize and solarize grow stronger, as in the authors'
# code; the table leaves the direction open.
AUTOAUGMENT: dict[str, Level] = {
    **_PLAIN,
    **_moves(30, 0.3, 150 / 331),
    **dict.fromkeys(_ENHANCEMENTS, _absolute),
    "invert": _none,
    "posterize": _bits_left(4),
    "solarize": _threshold,
}

_PAPER: dict[str, Level] = {
    "identity": _none,
    **_PLAIN,
    **_moves(30, 0.3, 150 / 331),
    **dict.fromkeys(_ENHANCEMENTS, _about_one(0.9)),
    "posterize": _bits_left(4),
    "solarize": _threshold,
}

# timm's "inc1" operations, of the released RepVGG training's default `rand-m9-mstd0.5-inc1`.
_TIMM: dict[str, Level] = {
    **_PLAIN,
    "invert": _none,
    **_moves(30, 0.3, 0.45),
    **dict.fromkeys(_ENHANCEMENTS, lambda strength, sign: max(0.1, 1 + sign * 0.9 * strength)),
    "posterize": lambda strength, sign: 4 - int(4 * strength),
    "solarize": lambda strength, sign: 256 - min(256, int(256 * strength)),
    "solarize_add": lambda strength, sign: min(128, int(110 * strength)),
}

# Of the released "raug15" of RepVGG and RepOptimizers, whose strength goes up to 1.4 and is not cut off.
_REPVGG: dict[str, Level] = {
    **_PLAIN,
    "invert": _none,
    **_moves(30, 0.3, 0.45),
    **dict.fromkeys(_ENHANCEMENTS, _absolute),
    "posterize": lambda strength, sign: min(8, int(4 * strength)),
    "solarize": lambda strength, sign: int(256 * strength),
    "solarize_add": lambda strength, sign: int(110 * strength),
    "cutout": lambda strength, sign: max(2, 40 * strength) / _SIDE,
}

RANDAUGMENT = {"paper": _PAPER, "timm": _TIMM, "repvgg": _REPVGG}

# TrivialAugment (2103.10158), its wide ranges. Shifts are in pixels there, for images of any size.
TRIVIAL_WIDE: dict[str, Level] = {
    "identity": _none,
    **_PLAIN,
    **_moves(135, 0.99, 32, "shift"),
    **dict.fromkeys(_ENHANCEMENTS, _about_one(0.99)),
    "posterize": _bits_left(2),
    "solarize": _threshold,
}
