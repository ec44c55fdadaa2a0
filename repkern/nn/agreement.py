"""The geometry of a block and that of the convolutions inside it: rewritten together, or refused.

A block has one geometry. Whoever rewrites an attribute of the block rewrites it in its convolutions too. Whoever walks
over the convolutions inside and rewrites them all alike ("dilate every 3x3") rewrites the block; when only some are
rewritten, there is no convolution that the block could be, and ValueError says which disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from repkern.nn.geometry import Geometry, check_geometry, same_padding

__all__ = [
    "ROLES",
    "Expected",
    "Part",
    "agreed",
    "disagrees",
    "expected",
    "parts_of",
    "push",
    "require_foldable",
    "rewritten",
]


class Part(NamedTuple):
    """A convolution inside a block: its dotted name, the module, and what it is there for (see `ROLES`)."""

    name: str
    module: Any
    role: str


#: stride, padding, dilation (None: any), padding_mode
Expected = tuple[Any, Any, Any, str]

# What the convolutions of our blocks are for, by the names they have in all of them:
# "main": the block's own geometry. "padded": reads a map that is padded already. "strided": 1x1 at the block's stride.
# "pointwise": 1x1 before a spatial one. "row", "column": 1xK and Kx1. "factor": stacked in a deep stem, whose last one
# has the stride.
ROLES = {
    "dense": "main",
    "conv": "main",
    "expand": "padded",
    "pointwise": "strided",
    "reduce": "pointwise",
    "avg": "pointwise",
    "horizontal": "row",
    "vertical": "column",
    "factors": "factor",
}
# Whose value of a field is the block's own.
_SPEAKS = {
    "stride": ("main", "padded", "strided", "row", "column", "last"),
    "dilation": ("main", "padded", "row", "column", "factor", "last"),
    "padding_mode": ("main", "padded", "row", "column"),
    "padding": ("main", "padded"),
}
_LAST = "factors, the last"
_ONE = (1, 1)
_ZERO = (0, 0)
_WRITTEN = ("stride", "padding", "dilation", "padding_mode")


def parts_of(block: nn.Module) -> Iterator[Part]:
    """The convolutions of a block that have a geometry, nested blocks among them."""
    for name, child in block._modules.items():
        role = ROLES.get(name)
        if role is None or child is None:
            continue
        members = child._modules.items() if isinstance(child, nn.ModuleList) else ((None, child),)
        for at, module in members:
            if hasattr(module, "padding_mode"):
                is_last = role == "factor" and at == str(len(child) - 1)  # type: ignore[arg-type]
                yield Part(name if at is None else f"{name}.{at}", module, "last" if is_last else role)


def _canonical(role: str, g: Geometry) -> Expected:
    """(stride, padding, dilation, padding_mode) of a part in a block of geometry `g`; dilation None: any."""
    if role == "main":
        return g.stride, g.padding, g.dilation, g.padding_mode
    if role == "padded":
        return g.stride, _ZERO, g.dilation, "zeros"
    if role == "strided":
        return g.stride, _ZERO, None, "zeros"
    if role == "pointwise":
        return _ONE, _ZERO, None, "zeros"
    if role in ("factor", "last"):
        return g.stride if role == "last" else _ONE, g.dilation, g.dilation, "zeros"
    return g.stride, _line_padding(role, g), g.dilation, "zeros"


def _line_padding(role: str, g: Geometry) -> tuple[int, int]:
    """A line lies on the middle of the kernel: across itself it needs only what the middle sees beyond the input."""
    if g.padding_mode != "zeros":
        return _ZERO
    padding, across = list(g.pad), 0 if role == "row" else 1
    padding[across] = max(g.pad[across] - same_padding(g.kernel_size, g.dilation)[across], 0)
    return padding[0], padding[1]


def expected(g: Geometry) -> dict[str, Expected]:
    """Name of a part -> what `push` leaves in it, for `disagrees`."""
    return {name: _canonical(role, g) for name, role in ROLES.items()} | {_LAST: _canonical("last", g)}


def disagrees(name: str, module: Any, wanted: dict[str, Expected]) -> bool:
    """Whether a part, or one in a list of parts, is not as `push` leaves it. Asked in every forward."""
    if type(module) is not nn.Conv2d:  # as most are, and asking less of them halves the time
        if isinstance(module, nn.ModuleList):
            members = list(module)
            last = _LAST if name == "factors" else name
            return disagrees(last, members[-1], wanted) or any(disagrees(name, part, wanted) for part in members[:-1])
        if not hasattr(module, "padding_mode"):  # somebody's wrapper, whose geometry is its own affair
            return False
    stride, padding, dilation, mode = wanted[name]
    return (
        module.stride != stride
        or module.padding != padding
        or module.padding_mode != mode
        or (dilation is not None and module.dilation != dilation)
    )


def push(block: nn.Module, g: Geometry) -> None:
    """Write the block's geometry into the convolutions inside."""
    for _, module, role in parts_of(block):
        for name, value in zip(_WRITTEN, _canonical(role, g), strict=True):
            if value is not None and getattr(module, name) != value:
                setattr(module, name, value)
        if "_reversed_padding_repeated_twice" in vars(module):
            # nn.Conv2d pads by this list, made once, in the other padding modes.
            height, width = _pad_of(module)
            module._reversed_padding_repeated_twice = [width, width, height, height]


def require_foldable(block: nn.Module, biased: frozenset[str]) -> None:
    """ValueError for a convolution inside that computes what folding would leave out: a bias, a forward of its own.

    biased: the parts whose bias is folded.
    """
    for name, child in block._modules.items():
        if name in ROLES and child is not None:
            for part in child if isinstance(child, nn.ModuleList) else (child,):
                _require_foldable(f"{type(block).__name__}.{name}", part, name in biased)


def _require_foldable(name: str, part: Any, biased: bool) -> None:
    plain = (
        type(part).forward is nn.Conv2d.forward and type(part)._conv_forward is nn.Conv2d._conv_forward
        if isinstance(part, nn.Conv2d)
        else False
    )
    if not plain and not hasattr(type(part), "_folds_whole"):
        raise ValueError(f"{name} is a {type(part).__name__}, which computes a forward of its own: it cannot be folded")
    if not biased and isinstance(getattr(part, "bias", None), nn.Parameter):
        raise ValueError(f"{name} has a bias, which the block has no place for: give it to the norm that follows")


def _pair(value: Any) -> Any:
    if isinstance(value, str):
        return value
    items = tuple(value) if isinstance(value, tuple | list) else (value, value)
    return items * 2 if len(items) == 1 else items


def _pad_of(conv: Any) -> tuple[int, int]:
    """The pixels that a convolution's `padding` stands for."""
    padding = _pair(conv.padding)
    if not isinstance(padding, str):
        return padding
    return _ZERO if padding == "valid" else same_padding(_pair(conv.kernel_size), _pair(conv.dilation))


def agreed(block: nn.Module, g: Geometry) -> Geometry:
    """The geometry that the convolutions inside a block have in common. ValueError, with what each has, if none."""
    parts = list(parts_of(block))
    wanted = g
    for field in ("stride", "dilation", "padding_mode", "padding"):
        proposed = {value for part in parts for value in _proposals(part, field, g)}
        if field == "padding" and not any(role in ("main", "padded") for _, _, role in parts):
            proposed = _padding_of_lines(parts, g)
        if len(proposed) > 1:
            raise _disagreement(block, g, parts)
        for value in proposed:
            wanted = _with(wanted, field, value)
    if any(role == "last" for _, _, role in parts) and wanted.dilation != g.dilation:
        wanted = _with(wanted, "padding", same_padding(g.kernel_size, wanted.dilation))
    if not all(_fits(part, wanted) for part in parts):
        raise _disagreement(block, g, parts)
    return wanted


def _with(g: Geometry, field: str, value: Any) -> Geometry:
    return rewritten(g, **{field: value})


def rewritten(g: Geometry, **changes: Any) -> Geometry:
    """The geometry with other values in it, checked as those of a new block."""
    given = g._asdict() | changes
    del given["pad"]
    if changes.get("padding", g.padding) == "same" and _pair(given["stride"]) != _ONE:
        given["padding"] = g.pad  # as the stride is written, "same" is what it was
    return check_geometry(**given)


def _proposals(part: Part, field: str, g: Geometry) -> Iterator[Any]:
    """What a part that was rewritten says about a field of the block."""
    module, role = part.module, part.role
    before = dict(zip(_WRITTEN, _canonical(role, g), strict=True))
    now = _pair(getattr(module, field)) if field != "padding_mode" else module.padding_mode
    if role in _SPEAKS[field] and before[field] is not None and now != before[field]:
        yield now


def _padding_of_lines(parts: list[Part], g: Geometry) -> set[Any]:
    """What 1xK and Kx1 say, each about the axis along it, where nothing else has the block's padding."""
    pad = list(g.pad)
    alongs = {0 if role == "column" else 1: module for _, module, role in parts if role in ("row", "column")}
    for along, module in alongs.items():
        pad[along] = _pad_of(module)[along]
    if len(alongs) == 1 and g.pad[0] == g.pad[1]:
        pad = [pad[along] for along in alongs] * 2
    return {(pad[0], pad[1])} if alongs and g.padding_mode == "zeros" else set()


def _fits(part: Part, g: Geometry) -> bool:
    """Whether a part may stand in a block of this geometry, as `push` leaves it or as a walk over all parts does."""
    module, role = part.module, part.role
    stride, padding, dilation, mode = _canonical(role, g)
    if _pair(module.stride) != stride or (dilation is not None and _pair(module.dilation) != dilation):
        return False
    if role == "main" and module.padding_mode != mode:
        return False
    if role in ("padded", "row", "column") and module.padding_mode not in ("zeros", g.padding_mode):
        return False
    own = _pad_of(module)
    if role == "main":
        return own == g.pad
    if role == "padded":
        return own in (_ZERO, g.pad)
    if role in ("row", "column"):
        # As walks over all convolutions write it, axis by axis or by the height of the kernel.
        by_height = (module.kernel_size[0] // 2 * g.dilation[0],) * 2
        return own in (padding, (0, g.pad[1]) if role == "row" else (g.pad[0], 0), by_height)
    return own == padding or (role in ("factor", "last") and own in (_ONE, g.dilation))


def _disagreement(block: nn.Module, g: Geometry, parts: list[Part]) -> ValueError:
    seen = {name: ", ".join(f"{field}={getattr(module, field)!r}" for field in _WRITTEN) for name, module, _ in parts}
    listed = "; ".join(f"{name}: {text}" for name, text in seen.items())
    return ValueError(
        f"{type(block).__name__}: the convolutions inside were rewritten and do not agree on one geometry ({listed}; "
        f"the block: stride={g.stride}, padding={g.padding!r}, dilation={g.dilation}, "
        f"padding_mode={g.padding_mode!r}). Rewrite the block's own attributes, or all of its convolutions alike"
    )
