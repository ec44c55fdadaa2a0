"""Names of the layers around the blocks: those of released networks -> those of repkern.models."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from repkern.models.checkpoints.layout import inside

__all__ = ["NAMINGS", "Naming", "Rename", "rename_network"]

#: A name inside the network -> ours; the same where it stays, None where ours has no such layer.
Rename = Callable[[str], str | None]


@dataclass(frozen=True)
class Naming:
    """How one released network names its layers.

    marks: patterns of beginnings, each of which some name has. head: the one that makes it certain, for checkpoints
    without a model to look at. rename: from all tensors of the network, how each is renamed.
    """

    name: str
    marks: tuple[str, ...]
    head: str
    rename: Callable[[Mapping[str, Tensor]], Rename]


def _replacing(*table: tuple[str, str | None]) -> Callable[[Mapping[str, Tensor]], Rename]:
    """The first pattern that a name begins with is replaced; None leaves the name out."""
    compiled = [(re.compile(pattern), new) for pattern, new in table]

    def rename(name: str) -> str | None:
        for pattern, new in compiled:
            found = pattern.match(name)
            if found:
                return None if new is None else found.expand(new) + name[found.end() :]
        return name

    return lambda names: rename


# RepVGG (stage0 is a block), MobileOne, RepOpt-VGG, and the ResNets of DBB, ACNet and OREPA (stage0.conv1 is one).
_STAGE = re.compile(r"stage([1-9])(?:_(first|second))?\.(?:blocks\.)?(\d+)\.")
_AROUND = _replacing(
    (r"stage0\.conv1\.", "stem."),
    (r"stage0\.", "stem."),
    (r"linear\.", "head."),
    (r"stage\d(?:_first)?_aux\.", None),
)


def _stages(names: Mapping[str, Tensor]) -> Rename:
    """Stage N becomes stages.(N-1); RepVGGplus cuts its third in two, which are counted on."""
    around = _AROUND(names)
    first = {found[3] for found in map(_STAGE.match, names) if found and found[2] == "first"}

    def rename(name: str) -> str | None:
        found = _STAGE.match(name)
        if found is None:
            return around(name)
        at = int(found[3]) + (len(first) if found[2] == "second" else 0)
        return f"stages.{int(found[1]) - 1}.{at}.{name[found.end() :]}"

    return rename


def _repnas(tensors: Mapping[str, Tensor]) -> Rename:
    """features.0 is the stem, features.1 begins the first stage, and every other stage begins where Co changes."""
    kernels = {
        int(found[1]): tensors[found[0]]
        for found in map(re.compile(r"features\.(\d+)\.conv\.(?:conv\.)?weight").fullmatch, tensors)
        if found
    }
    around = _replacing((r"linear\.", "head."), (r"alphas$", None))(tensors)
    places: dict[int, str] = {}
    stage = at = -1
    for layer in sorted(kernels):
        begins = layer < 2 or len(kernels[layer]) != len(kernels.get(layer - 1, ()))
        stage, at = (stage + 1, 0) if begins else (stage, at + 1)
        places[layer] = "stem" if layer == 0 else f"stages.{stage - 1}.{at}"

    def rename(name: str) -> str | None:
        found = re.match(r"features\.(\d+)\.", name)
        if found and int(found[1]) in places:
            return f"{places[int(found[1])]}.{name[found.end() :]}"
        return around(name)

    return rename


# Units of the released network, in one sequence, by the stages of ours.
_MOBILENET_STAGES = (1, 2, 2, 6, 2)


def _mobilenet(names: Mapping[str, Tensor]) -> Rename:
    places = [f"stages.{stage}.{at}" for stage, count in enumerate(_MOBILENET_STAGES) for at in range(count)]
    around = _replacing((r"conv1\.", "stem."), (r"linear\.", "head."))(names)

    def rename(name: str) -> str | None:
        found = re.match(r"stem\.(\d+)\.", name)
        if found and int(found[1]) < len(places):
            return f"{places[int(found[1])]}.{name[found.end() :]}"
        return around(name)

    return rename


def _torchvision(names: Mapping[str, Tensor]) -> Rename:
    around = _replacing(
        (r"conv1\.", "stem.conv."),
        (r"bn1\.", "stem.bn."),
        (r"fc\.", "head."),
        (r"layer(\d)\.(\d+)\.downsample\.0\.", r"layer\1.\2.shortcut.conv."),
        (r"layer(\d)\.(\d+)\.downsample\.1\.", r"layer\1.\2.shortcut.bn."),
        (r"layer(\d)\.(\d+)\.conv(\d)\.", r"layer\1.\2.conv\3.conv."),
        (r"layer(\d)\.(\d+)\.bn(\d)\.", r"layer\1.\2.conv\3.bn."),
    )(names)

    def rename(name: str) -> str | None:
        new = around(name)
        found = None if new is None else re.match(r"layer(\d)\.", new)
        return new if found is None or new is None else f"stages.{int(found[1]) - 1}.{new[found.end() :]}"

    return rename


def _repghost(names: Mapping[str, Tensor]) -> Rename:
    last = max((int(found[1]) for found in (re.match(r"blocks\.(\d+)\.", name) for name in names) if found), default=-1)
    unit = r"blocks\.(\d+)\.(\d+)\."
    return _replacing(
        (r"conv_stem\.", "stem.conv."),
        (r"bn1\.", "stem.bn."),
        (rf"blocks\.{last}\.0\.conv\.", "final.conv."),
        (rf"blocks\.{last}\.0\.bn1\.", "final.bn."),
        (rf"{unit}conv_dw\.", r"stages.\1.\2.depthwise.conv."),
        (rf"{unit}bn_dw\.", r"stages.\1.\2.depthwise.bn."),
        (rf"{unit}se\.conv_reduce\.", r"stages.\1.\2.se.down."),
        (rf"{unit}se\.conv_expand\.", r"stages.\1.\2.se.up."),
        (rf"{unit}shortcut\.0\.", r"stages.\1.\2.shortcut.depthwise.conv."),
        (rf"{unit}shortcut\.1\.", r"stages.\1.\2.shortcut.depthwise.bn."),
        (rf"{unit}shortcut\.2\.", r"stages.\1.\2.shortcut.pointwise.conv."),
        (rf"{unit}shortcut\.3\.", r"stages.\1.\2.shortcut.pointwise.bn."),
        (unit, r"stages.\1.\2."),
        (r"conv_head\.", "hidden."),
        (r"classifier\.", "head."),
    )(names)


NAMINGS = (
    # timm's features_only networks have the stages as children of their own.
    Naming(
        "timm_features", (r"stem[._]", r"stages_0\."), r"stages_1\.", _replacing((r"stages_(\d+)\.", r"stages.\1."))
    ),
    Naming("stages", (r"stage0\.", r"stage1\."), r"linear\.weight", _stages),
    Naming("repnas", (r"features\.0\.(?:_ops|conv|skip_connect)\.",), r"linear\.weight", _repnas),
    Naming("mobilenet", (r"conv1\.", r"stem\.0\.depthwise\.", r"stem\.0\.pointwise\."), r"linear\.weight", _mobilenet),
    Naming("repghost", (r"blocks\.\d+\.\d+\.ghost1\.",), r"classifier\.weight", _repghost),
    Naming("torchvision", (r"conv1\.", r"layer1\.0\.conv1\."), r"fc\.weight", _torchvision),
    Naming(
        "timm", (r"stem\.", r"stages\.0\.", r"head\.fc\."), r"head\.fc\.weight", _replacing((r"head\.fc\.", "head."))
    ),
)


def rename_network(
    tensors: Mapping[str, Tensor], modules: Collection[str] | None = None, *, certain: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by the names that suit the model best, names for which ours has no place).

    modules: dotted names of the model's modules; the naming under which most of the checkpoint finds its module wins,
    and none at all where the names already do. None (no model): the first naming that certainly is the checkpoint's, or
    with certain=False that may be.
    """
    best: tuple[dict[str, Tensor], list[str]] = (dict(tensors), [])
    known = None if modules is None else set(modules)
    score = 0 if known is None else _reach(tensors, known)
    for naming in NAMINGS:
        for prefix in _prefixes(naming, tensors, certain=certain and known is None):
            candidate = _applied(naming, prefix, tensors)
            if candidate is None:
                continue
            if known is None:
                return candidate
            reach = _reach(candidate[0], known)
            if reach > score:
                best, score = candidate, reach
    return best


def _applied(naming: Naming, prefix: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
    """None where two tensors would get one name, which never happens to the network that the naming is for."""
    rename = naming.rename(inside(prefix, tensors))
    renamed: dict[str, Tensor] = {}
    left_out: list[str] = []
    for name, tensor in tensors.items():
        new = name
        if name.startswith(prefix):
            within = rename(name.removeprefix(prefix))
            if within is None:
                left_out.append(name)
                continue
            new = prefix + within
        if new in renamed:
            return None
        renamed[new] = tensor
    return renamed, left_out


def _prefixes(naming: Naming, tensors: Mapping[str, Tensor], *, certain: bool) -> Iterator[str]:
    first = re.compile(rf"(|.*?\.){naming.marks[0]}")
    needed = [*naming.marks[1:], naming.head] if certain else naming.marks[1:]
    for prefix in dict.fromkeys(found[1] for found in map(first.match, tensors) if found):
        here = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        if all(any(re.match(mark, name) for name in here) for mark in needed):
            yield prefix


def _reach(tensors: Mapping[str, Tensor], modules: Collection[str]) -> int:
    """How deep into the model the names reach, summed, and how many end in a module of it."""
    total = 0
    for name in tensors:
        parts = name.split(".")[:-1]
        own = len(parts)
        while parts and ".".join(parts) not in modules:
            parts.pop()
        total += len(parts) + (len(parts) == own)
    return total
