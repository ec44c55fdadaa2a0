"""Inputs of orepa_squeeze for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repkern.ops._sample import Sample
from repkern.ops.orepa_squeeze.layers import SqueezeBranches, kernel_shape, pack
from repkern.ops.orepa_squeeze.prior import dct_filter

__all__ = ["random_layer", "samples"]

_PAIRED = {"prior": ("prior", "prior_filter"), "expand": ("reduce", "expand"), "project": ("depthwise", "project")}


def random_layer(
    ci: int,
    co: int,
    k: int,
    *,
    groups: int = 1,
    cm: int | None = None,
    expansion: int = 8,
    without: Sequence[str] = (),
    scale: str = "vector",
    identity_reduce: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> SqueezeBranches:
    """A layer of standard normal parameters. `without`: origin, avg, prior, pointwise, expand, project.

    scale: "vector" (6 rows), "compact" (a row per present branch) or "none".
    """
    cm = ci if cm is None else cm

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    flat = (co, ci // groups)
    layer = SqueezeBranches(
        origin=random(co, ci // groups, k, k),
        avg=random(*flat),
        prior=random(*flat),
        pointwise=random(*flat),
        reduce=random(cm, ci // groups),
        expand=random(co, cm // groups, k, k),
        depthwise=random(ci * expansion, k, k),
        project=random(co, ci // groups * expansion),
        prior_filter=dct_filter(co, k, dtype=dtype),
        groups=groups,
        identity_reduce=identity_reduce,
    )
    for branch in without:
        absent: dict[str, Any] = dict.fromkeys(_PAIRED.get(branch, (branch,)))
        layer = layer._replace(**absent)
    rows = {"vector": 6, "compact": sum(layer.present), "none": 0}[scale]
    return layer._replace(scale=random(rows, co) if rows else None)


def _cases() -> dict[str, list[SqueezeBranches]]:
    g = torch.Generator().manual_seed(7)
    rep_1x1 = ("avg", "prior", "pointwise", "project")
    vgg = ("pointwise",)
    layer = random_layer
    cases = {
        "one_by_one": [layer(1, 1, 1, expansion=1, generator=g)],
        "k3_odd": [layer(5, 7, 3, expansion=3, generator=g)],
        "k3_tile_edge": [layer(17, 16, 3, expansion=2, cm=15, identity_reduce=False, generator=g)],
        "k3_groups": [layer(12, 8, 3, groups=4, cm=8, generator=g)],
        "k3_groups_wide": [layer(34, 4, 3, groups=2, cm=68, expansion=1, generator=g)],
        "k3_depthwise": [layer(9, 9, 3, groups=9, generator=g)],
        "k3_depthwise_double": [layer(6, 12, 3, groups=6, cm=12, expansion=2, generator=g)],
        "k5": [layer(3, 4, 5, expansion=5, generator=g)],
        "k7_stem": [layer(3, 10, 7, cm=6, expansion=2, scale="none", generator=g)],
        "rep_1x1": [layer(19, 11, 1, without=rep_1x1, scale="compact", generator=g)],
        "orepa_vgg": [layer(6, 6, 3, without=vgg, scale="compact", generator=g)],
        "origin_only": [layer(4, 3, 3, without=("avg", "prior", "pointwise", "expand", "project"), generator=g)],
        "no_origin": [layer(4, 3, 3, without=("origin",), scale="compact", generator=g)],
        "no_gemm": [layer(4, 18, 3, without=("expand",), generator=g)],
        "only_gemm": [layer(18, 4, 3, without=("origin", "avg", "prior", "pointwise", "project"), generator=g)],
    }
    cases["many"] = [cases[name][0] for name in ("k3_odd", "rep_1x1", "k5", "no_gemm", "k3_groups")]
    return cases


def _slow_cases() -> dict[str, list[SqueezeBranches]]:
    g = torch.Generator().manual_seed(8)
    return {
        "k3_c50": [random_layer(50, 49, 3, generator=g)],
        "k3_c97_groups": [random_layer(98, 66, 3, groups=2, cm=194, generator=g)],
        "k5_c33": [random_layer(33, 65, 5, generator=g)],
        "k1_c100": [random_layer(100, 35, 1, without=("avg", "prior", "pointwise", "project"), generator=g)],
        "k3_depthwise_c64": [random_layer(64, 64, 3, groups=64, generator=g)],
    }


def samples(op_name: str) -> list[Sample]:
    """Samples for `orepa_squeeze_many` or its backward."""
    make = _forward if op_name == "orepa_squeeze_many" else _backward
    found = [make(name, layers) for name, layers in _cases().items()]
    found += [make(name, layers, slow=True) for name, layers in _slow_cases().items()]
    if op_name == "orepa_squeeze_many":
        many = _cases()["many"]
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            found.append(_forward(f"many_{str(dtype).removeprefix('torch.')}", many, out_dtype=dtype))
        found.append(_forward("many_channels_last", many, channels_last=True))
        found.append(_forward("many_channels_last_bf16", many, channels_last=True, out_dtype=torch.bfloat16))
    return found


def _forward(
    name: str,
    layers: list[SqueezeBranches],
    out_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    slow: bool = False,
) -> Sample:
    lengths = []
    for layer in layers:
        internal = 0 if layer.expand is None else layer.expand.shape[1]
        expansion = 0 if layer.project is None else layer.project.shape[1] // kernel_shape(layer)[1]
        lengths.append(internal + expansion)
    args = (*pack(layers), out_dtype, channels_last)
    return Sample(name, args, tuple(lengths), out_dtype=out_dtype, slow=slow)


def _backward(name: str, layers: list[SqueezeBranches], slow: bool = False) -> Sample:
    generator = torch.Generator().manual_seed(len(name))
    grads, lengths = [], []
    for layer in layers:
        co, cig, k, _ = kernel_shape(layer)
        grads.append(torch.randn(co, cig, k, k, dtype=torch.float64, generator=generator))
        cog, hw = co // layer.groups, k * k
        internal = 0 if layer.expand is None else layer.expand.shape[1]
        expansion = 0 if layer.project is None else layer.project.shape[1] // cig
        by_field = {
            "origin": 1, "avg": hw, "prior": hw, "pointwise": 1, "reduce": cog * hw, "expand": cig,
            "depthwise": cog, "project": hw, "scale": cig * hw + internal * hw + expansion,
        }  # fmt: skip
        lengths += [n for field, n in by_field.items() if getattr(layer, field) is not None]
    return Sample(name, (grads, *pack(layers)), tuple(lengths), slow=slow)
