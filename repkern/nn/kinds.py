"""Kinds of blocks by name: what `create_model(block=...)` puts in the place of every convolution."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from repkern.nn.acb import ACBlock
from repkern.nn.block import RepBlock
from repkern.nn.conv_norm_act import ConvNormAct
from repkern.nn.csla import CSLABlock
from repkern.nn.dbb import DiverseBranchBlock
from repkern.nn.dyrep import DyRepBlock
from repkern.nn.geometry import Geometry, Pair, check_geometry
from repkern.nn.mobileone import MobileOneBlock
from repkern.nn.odb import ODBBlock
from repkern.nn.orepa_block import OREPABlock, OREPADeepStem
from repkern.nn.orepa_repvgg import OREPARepVGGBlock
from repkern.nn.qarepvgg import QARepVGGBlock
from repkern.nn.repvgg import RepVGGBlock
from repkern.nn.squeeze_excite import SqueezeExcite

__all__ = ["BLOCKS", "KINDS", "check_kind", "make_block"]


class _Form(NamedTuple):
    """A block class and the kernel sizes it stands in for; others become a ConvNormAct."""

    block: type[RepBlock]
    smallest: int = 3
    largest: int = 5


# Kernel sizes as in the released networks of each block: 1x1 layers and 7x7 stems stay conv + BN except with OREPA.
_FORMS: dict[str, tuple[_Form, ...]] = {
    "conv_bn": (_Form(ConvNormAct, 1, 255),),
    "repvgg": (_Form(RepVGGBlock),),
    "acb": (_Form(ACBlock),),
    "dbb": (_Form(DiverseBranchBlock),),
    "orepa": (_Form(OREPABlock, 1, 5), _Form(OREPADeepStem, 7, 255)),
    "orepa_vgg": (_Form(OREPARepVGGBlock),),
    "odbb": (_Form(ODBBlock),),
    "dyrep": (_Form(DyRepBlock, 3, 255),),
    "csla": (_Form(CSLABlock),),
    "qarepvgg": (_Form(QARepVGGBlock),),
    "mobileone": (_Form(MobileOneBlock, 1, 255),),
}

_FACTORY = ("padding_mode", "device", "dtype")

# What a block's identity branch is called; a block without one has None there.
_IDENTITIES = ("identity_bn", "identity_scale", "identity")

#: The main block class of every trainable kind.
BLOCKS: dict[str, type[RepBlock]] = {kind: forms[0].block for kind, forms in _FORMS.items()}

#: Every name that `make_block` takes.
KINDS: tuple[str, ...] = ("plain", *BLOCKS)


def check_kind(kind: str, options: Mapping[str, Any], more: Mapping[str, Collection[str]] | None = None) -> None:
    """ValueError for an unknown kind, TypeError for options that none of its classes take; both say what there is.

    more: further kinds, with their options.
    """
    known_kinds = (*KINDS, *(more or {}))
    if kind not in known_kinds:
        raise ValueError(f"block must be one of {', '.join(known_kinds)}, got {kind!r}")
    known = set((more or {}).get(kind, ())) or {name for form in _FORMS.get(kind, ()) for name in _keywords(form.block)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(
            f"block {kind!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'no options'}"
        )


def _keywords(block: type[RepBlock]) -> frozenset[str]:
    """The options of a block class beyond those that `make_block` names itself."""
    return frozenset(_arguments(block)) - {"self", *inspect.signature(make_block).parameters, *_FACTORY}


def _arguments(block: type[RepBlock]) -> frozenset[str]:
    return frozenset(inspect.signature(block.__init__).parameters)


def make_block(
    kind: str,
    in_channels: int,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: str | Pair | None = None,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    activation: nn.Module | None = None,
    se: int | None = None,
    post_se: int | None = None,
    identity: bool = True,
    recompute: str = "none",
    **options: Any,
) -> nn.Module:
    """A fresh block of `kind` (one of `KINDS`), or its deployed form for "plain".

    A kind that has no form for this kernel size gives a ConvNormAct. se, post_se: channels that a squeeze-excite before
    or after the activation reduces to, for every kind. identity=False: no identity branch even where one is possible.
    recompute: handed to the classes that have it, those that sum several normed branches.
    options: those of the kind's classes; each class gets the ones it takes (see `check_kind`). Of `branches`, one list
    for all layers of a network, a layer that cannot have an identity gets all but "id".
    Whatever the kind, the reparameterized state_dict has the keys and shapes of kind="plain".
    """
    geometry = check_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
    wanted = {"se": se, "post_se": post_se}
    excite = {name: reduced for name, reduced in wanted.items() if reduced is not None}
    if kind == "plain":
        return _followed(nn.Conv2d(*geometry[:7], bias=True), activation, excite)
    check_kind(kind, options)
    block = _form_of(kind, geometry.kernel_size[0])
    taken: dict[str, Any] = {name: value for name, value in options.items() if name in _keywords(block)}
    if taken.get("branches") is not None and not _may_be_identity(geometry):
        taken["branches"] = [name for name in taken["branches"] if name != "id"]
    if "recompute" in _arguments(block):
        taken["recompute"] = recompute
    make: Callable[..., RepBlock] = block
    if set(excite) <= _arguments(block):
        return _with_identity(make(*geometry[:7], activation=activation, **excite, **taken), identity)
    return _followed(_with_identity(make(*geometry[:7], **taken), identity), activation, excite)


def _may_be_identity(geometry: Geometry) -> bool:
    return geometry.in_channels == geometry.out_channels and geometry.stride == (1, 1)


def _form_of(kind: str, kernel_size: int) -> type[RepBlock]:
    fitting = (form.block for form in _FORMS[kind] if form.smallest <= kernel_size <= form.largest)
    return next(fitting, ConvNormAct)


def _followed(conv: Any, activation: nn.Module | None, excite: Mapping[str, int]) -> nn.Module:
    """What a block with these computes behind its convolution, under the names they have in its deployed form."""
    excites = {name: SqueezeExcite(conv.out_channels, reduced) for name, reduced in excite.items()}
    after = {"se": excites.get("se"), "activation": activation, "post_se": excites.get("post_se")}
    present = {name: module for name, module in after.items() if module is not None}
    return nn.Sequential(OrderedDict(conv=conv, **present)) if present else conv


def _with_identity(block: RepBlock, wanted: bool) -> RepBlock:
    for name in () if wanted else _IDENTITIES:
        if getattr(block, name, None) is not None:
            setattr(block, name, None)
    return block
