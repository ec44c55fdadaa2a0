"""What a released layout is made of, and the conversion of its blocks wherever they sit in a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = [
    "CONV_BN",
    "CONV_BN_DEPLOYED",
    "SE",
    "Block",
    "BlockRule",
    "Conversion",
    "Found",
    "Layout",
    "convert_blocks",
    "deployed",
    "fold_norms",
    "inside",
    "prefixed",
    "renamed",
]

#: The tensors of one block, by their names inside it.
Block = dict[str, Tensor]

#: Squeeze-excite before and after the activation, where its convolutions are named as ours.
SE = {"se": "se", "post_se": "post_se"}

_REST = r"(?:\..+)?"
_EPS = 1e-5
_NORM_PARTS = {"weight", "bias", "running_mean", "running_var"}


def prefixed(prefix: str, block: Mapping[str, Tensor]) -> Block:
    """Every name with `prefix` before it."""
    return {f"{prefix}{name}": tensor for name, tensor in block.items()}


def inside(prefix: str, block: Mapping[str, Tensor]) -> Block:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in block.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class BlockRule:
    """How one kind of released block becomes ours.

    mark: pattern of the name that betrays such a block; needs, lacks: patterns of names that must, or must not, be
    there as well. telling: whether only this code base has such blocks. before_inner: it reads the released names of
    the blocks inside it; other blocks get them converted.
    keys: pattern of all names of such a block, each of them relative to the block. convert: its tensors -> ours,
    differentiable; KeyError for one that is absent. dropped: pattern of the names that have no place in ours.
    deployed: the block is one convolution, "weight" and "bias". activated: it is always followed by an activation, so
    that without a model to look at, the convolution is taken to be in `conv`.
    """

    mark: str
    keys: str
    convert: Callable[[Block], Block]
    needs: tuple[str, ...] = ()
    dropped: str | None = None
    deployed: bool = False
    activated: bool = False
    lacks: tuple[str, ...] = ()
    telling: bool = True
    before_inner: bool = False


@dataclass(frozen=True)
class Layout:
    """One released code base: its name, what it is, and its blocks. Rules are tried in order."""

    name: str
    source: str
    rules: tuple[BlockRule, ...]

    def fits(self, tensors: Mapping[str, Tensor], *, certain: bool = True) -> bool:
        """Whether any tensor belongs to a block of this layout; certain: to one that no other code has."""
        rules = [rule for rule in self.rules if rule.telling or not certain]
        return any(True for rule in rules for _ in _prefixes(rule, tensors))


def _pattern(name: str) -> str:
    """A name as a pattern; "#" stands for a number."""
    return re.escape(name).replace(r"\#", r"(\d+)")


def renamed(
    names: Mapping[str, str], mark: str, *, needs: tuple[str, ...] = (), dropped: tuple[str, ...] = ()
) -> BlockRule:
    """A rule that only renames: released name of a module or tensor -> ours; "#" in both is a number that is kept.

    mark, needs: as in `BlockRule`, but names. `dropped` modules are left out.
    """
    # The longest name first: bn1.bn before bn1.
    table = [
        (re.compile(rf"{_pattern(name)}({_REST})"), name) for name in sorted([*names, *dropped], key=len, reverse=True)
    ]

    def convert(block: Block) -> Block:
        ours: Block = {}
        for name, tensor in block.items():
            found, released = next((found, key) for pattern, key in table if (found := pattern.fullmatch(name)))
            if released in names:
                *numbers, rest = found.groups()
                new = names[released]
                for number in numbers:
                    new = new.replace("#", number, 1)
                ours[new + rest] = tensor
        return ours

    without = "|".join(rf"{_pattern(name)}{_REST}" for name in dropped) or None
    keys = "|".join(pattern.pattern for pattern, _ in table)
    return BlockRule(_pattern(mark), keys, convert, tuple(map(_pattern, needs)), without)


def deployed(conv: str, beside: Mapping[str, str] | None = None, *, activated: bool) -> BlockRule:
    """A rule for a block that has become the convolution `conv`, with other modules `beside` it."""
    rule = renamed({f"{conv}.weight": "weight", f"{conv}.bias": "bias", **(beside or {})}, f"{conv}.weight")
    return BlockRule(rule.mark, rule.keys, rule.convert, deployed=True, activated=activated)


#: Convolution, norm and activation whose norm was folded: `conv` stays beside an activation, else takes its place.
CONV_BN_DEPLOYED = replace(
    deployed("conv", activated=True), mark=r"conv\.bias", needs=(r"conv\.weight",), lacks=(r"bn\..*",), telling=False
)


#: Convolution, norm and activation, and squeeze-excite as in RepOptimizers.
CONV_BN = replace(renamed({"conv": "conv", "bn": "bn", **SE}, "conv.weight", needs=("bn.running_mean",)), telling=False)


@dataclass(frozen=True)
class Found:
    """A block of a checkpoint: its prefix, its layout ("" for a common one), whether it is deployed, its names here."""

    prefix: str
    layout: str
    deployed: bool
    names: tuple[str, ...]


@dataclass
class Conversion:
    """Tensors in our names, the blocks that were found, and the names that have no place in ours."""

    tensors: dict[str, Tensor]
    blocks: list[Found] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def _prefixes(rule: BlockRule, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    mark = re.compile(rf"(|.*\.)(?:{rule.mark})")
    for name in tensors:
        found = mark.fullmatch(name)
        if (
            found
            and all(_has(tensors, found[1], need) for need in rule.needs)
            and not any(_has(tensors, found[1], lack) for lack in rule.lacks)
        ):
            yield found[1]


def _has(tensors: Mapping[str, Tensor], prefix: str, pattern: str) -> bool:
    wanted = re.compile(f"{re.escape(prefix)}(?:{pattern})")
    return any(wanted.fullmatch(name) for name in tensors)


def convert_blocks(
    tensors: Mapping[str, Tensor], layouts: Sequence[Layout], model_names: Collection[str] = ()
) -> Conversion:
    """Bring every block of these layouts to our names, under the prefix it has. Other names stay, and the order.

    model_names: the names of the model's state_dict; they tell whether a convolution, or a whole block, sits in `conv`
    beside an activation. Blocks inside blocks are converted first. ValueError, naming the block, when one of its
    tensors is absent or has a shape that fits no such block.
    """
    done = Conversion({})
    left = dict(tensors)
    position = {name: at for at, name in enumerate(tensors)}
    found = [
        (prefix, rule, layout)
        for layout in layouts
        for rule in layout.rules
        for prefix in dict.fromkeys(_prefixes(rule, left))
    ]
    # Stable: of two rules that claim one prefix the first wins, since it takes the names away.
    for prefix, rule, layout in sorted(found, key=_order):
        own = re.compile(f"{re.escape(prefix)}(?:{rule.keys})")
        block = {name.removeprefix(prefix): tensor for name, tensor in left.items() if own.fullmatch(name)}
        if not any(re.fullmatch(rule.mark, name) for name in block):
            continue
        try:
            ours = rule.convert(block)
        except KeyError as absent:
            raise ValueError(f"block {prefix.rstrip('.') or '(root)'}: {absent} is absent") from None
        except (RuntimeError, IndexError, ValueError) as problem:
            raise ValueError(f"block {prefix.rstrip('.') or '(root)'}: its tensors do not fit ({problem})") from problem
        for name in block:
            del left[prefix + name]
            if rule.dropped is not None and re.fullmatch(rule.dropped, name):
                done.left_out.append(prefix + name)
        placed = _placed(prefix, ours, rule, model_names)
        done.blocks.append(Found(prefix, layout.name if rule.telling else "", rule.deployed, tuple(placed)))
        left |= placed
        position |= dict.fromkeys(placed, min(position[prefix + name] for name in block))
    done.tensors = {name: left[name] for name in sorted(left, key=position.__getitem__)}
    return done


def _order(found: tuple[str, BlockRule, Layout]) -> tuple[bool, bool, int]:
    """Blocks that only one code base has come first, inner ones before those around them."""
    prefix, rule, _ = found
    return not rule.telling, not rule.before_inner, -prefix.count(".")


def _placed(prefix: str, ours: Block, rule: BlockRule, model_names: Collection[str]) -> Block:
    """Under the block's prefix, or in `conv` beside an activation where the model has it there."""
    fallback = 2 if rule.deployed and rule.activated else 0
    places: dict[str, tuple[str, str, str]] = {}
    for name in ours:
        parent, dot, leaf = name.rpartition(".")
        plain = prefix + name
        moves = name.partition(".")[0] not in SE
        places[name] = (plain, f"{prefix}conv.{name}", f"{prefix}{parent}{dot}conv.{leaf}") if moves else (plain,) * 3
    found = [at for options in places.values() for at, option in enumerate(options) if option in model_names]
    fallback = min(found, default=fallback)
    return {
        next((option for option in places[name] if option in model_names), places[name][fallback]): tensor
        for name, tensor in ours.items()
    }


def fold_norms(converted: Conversion, model_names: Collection[str]) -> None:
    """Fold the norms that a deployed file still has and the model has not: `conv`, `bn` -> a convolution with bias.

    Files do not hold eps; it is that of the released code, which is torch's.
    """
    tensors = converted.tensors
    for name in list(tensors):
        prefix = name.removesuffix("bn.running_mean")
        place = next((place for place in (f"{prefix}conv.", prefix) if f"{place}bias" in model_names), None)
        kernel = tensors.get(f"{prefix}conv.weight")
        norm = inside(f"{prefix}bn.", tensors)
        if prefix == name or place is None or kernel is None or name in model_names or not norm.keys() >= _NORM_PARTS:
            continue
        for part in norm:
            del tensors[f"{prefix}bn.{part}"]
        del tensors[f"{prefix}conv.weight"]
        factor = norm["weight"] / torch.sqrt(norm["running_var"] + _EPS)
        tensors[f"{place}weight"] = kernel * factor.reshape(-1, 1, 1, 1)
        tensors[f"{place}bias"] = norm["bias"] - norm["running_mean"] * factor
