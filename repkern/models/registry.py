"""Networks by name: create_model and list_models."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from repkern.models import mobilenet, mobileone, repghostnet, repopt_vgg, repvgg, resnet, vgg
from repkern.models.network import Network, Options

__all__ = ["create_model", "default_block", "list_models"]


class _Entry(NamedTuple):
    family: type[Network]
    variant: Any
    block: str


def _entries() -> dict[str, _Entry]:
    families: list[tuple[type[Network], Mapping[str, Any], str]] = [
        (repvgg.RepVGG, repvgg.MODELS, repvgg.DEFAULT_BLOCK),
        (repvgg.RepVGG, repopt_vgg.MODELS, repopt_vgg.DEFAULT_BLOCK),
        (resnet.ResNet, resnet.MODELS, resnet.DEFAULT_BLOCK),
        (vgg.VGG, vgg.MODELS, vgg.DEFAULT_BLOCK),
        (mobilenet.MobileNetV1, mobilenet.MODELS, mobilenet.DEFAULT_BLOCK),
        (mobileone.MobileOne, mobileone.MODELS, mobileone.DEFAULT_BLOCK),
        (repghostnet.RepGhostNet, repghostnet.MODELS, repghostnet.DEFAULT_BLOCK),
    ]
    return {
        name: _Entry(family, variant, block) for family, models, block in families for name, variant in models.items()
    }


_ENTRIES = _entries()


def list_models(pattern: str = "*") -> list[str]:
    """The names `create_model` takes that match a shell pattern ("repvgg_*"), sorted."""
    return sorted(fnmatch.filter(_ENTRIES, pattern))


def default_block(name: str) -> str:
    """The kind of block a network is published with: what block=None means."""
    return _entry(name).block


def create_model(
    name: str,
    *,
    block: str | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    output_stride: int = 32,
    checkpoint: str | Path | Mapping[str, Any] | None = None,
    width: float = 1.0,
    recompute: str = "none",
    block_options: Mapping[str, Any] | None = None,
    **family_options: Any,
) -> Network:
    """A network by its name (`list_models()`), with fresh weights: images [N, in_chans, H, W] -> [N, num_classes].

    block: the kind of its blocks, one of `repkern.nn.KINDS`; "plain" is the deployed form, which the reparameterized
    state_dict of every other kind loads into strictly. None: the block the network was published with.
    num_classes: 0 for no last layer. features_only: a list of feature maps instead, those numbered `out_indices`
    (default all; negative ones count from the end), described by `feature_info`; deeper layers are not made.
    output_stride: 8 or 16 keeps the last maps at 1/8 or 1/16 of the image by dilation; the weights stay the same.
    checkpoint: what `repkern.load_checkpoint` reads. width: multiplies all channel counts. recompute: "cheap" makes
    cheap branches again in the backward. block_options: keyword arguments of the block class, such as {"scaling":
    "scalar"} for OREPA. family_options: those of the family's class, such as dilated_layers for RepVGG.

    The arguments are kept in `config`, without `checkpoint`: create_model(**config) makes the same network again.
    ValueError for an unknown name (with those near it) or a value out of range, TypeError for unknown options and for
    arguments that are not JSON values.
    """
    entry = _entry(name)
    shared: dict[str, Any] = {
        "block": entry.block if block is None else block,
        "num_classes": num_classes,
        "in_chans": in_chans,
        "features_only": features_only,
        "out_indices": None if out_indices is None else list(out_indices),
        "output_stride": output_stride,
        "width": width,
        "recompute": recompute,
        "block_options": dict(block_options or {}),
    }
    build = _builder(name, entry, family_options)
    config = _json(name, {"name": name, **shared, **family_options})
    model = build(entry.variant, Options(**shared), **family_options)
    model.model_name = name
    model.config = config
    if checkpoint is not None:
        from repkern.models.checkpoints import load_checkpoint

        load_checkpoint(checkpoint, model)
    return model


def _builder(name: str, entry: _Entry, family_options: Mapping[str, Any]) -> Callable[..., Network]:
    known = set(inspect.signature(entry.family.__init__).parameters) - {"self", "variant", "options"}
    unknown = sorted(set(family_options) - known)
    if unknown:
        has = f"it has {', '.join(sorted(known))}" if known else "it has none of its own"
        raise TypeError(f"create_model({name!r}): no option {', '.join(unknown)}; {has}")
    return entry.family


def _entry(name: str) -> _Entry:
    if name in _ENTRIES:
        return _ENTRIES[name]
    near = difflib.get_close_matches(str(name), _ENTRIES, n=5, cutoff=0.5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise ValueError(f"there is no model {name!r}{hint}; repkern.list_models() has all {len(_ENTRIES)}")


def _json(name: str, config: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(config))
    except TypeError as problem:
        raise TypeError(f"create_model({name!r}): arguments must be JSON values ({problem})") from None
