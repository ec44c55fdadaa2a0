"""One layer's branches as Python sees them, and the flat form in which they pass through the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from repkern.ops import _check

__all__ = [
    "BRANCH_NAMES",
    "GRADIENT_FIELDS",
    "TENSOR_FIELDS",
    "SqueezeBranches",
    "check_layers",
    "kernel_shape",
    "pack",
    "unpack",
]

OP = "orepa_squeeze"
BRANCH_NAMES = ("origin", "avg", "prior", "1x1-KxK", "1x1", "dw-pw")
TENSOR_FIELDS = (
    "origin", "avg", "prior", "pointwise", "reduce", "expand", "depthwise", "project", "scale", "prior_filter",
)  # fmt: skip
GRADIENT_FIELDS = TENSOR_FIELDS[:9]
INTS_PER_LAYER = 3  # mask of present tensors, groups, identity_reduce


class SqueezeBranches(NamedTuple):
    """The tensors of one OREPA block. A branch whose tensors are None is absent and costs nothing.

    Shapes, with Co, Ci channels, g groups, odd K, Cm internal channels, e expansion:
    origin [Co, Ci/g, K, K]; avg, prior, pointwise [Co, Ci/g]; reduce [Cm, Ci/g] and expand [Co, Cm/g, K, K];
    depthwise [Ci*e, K, K] (channel i*e + q) and project [Co, Ci/g*e] (column i*e + q);
    scale [6, Co] in the order of BRANCH_NAMES, or [B, Co] with a row per present branch in that order, or None (ones);
    prior_filter [Co, K, K], present exactly when `prior` is, never differentiated.
    `identity_reduce` adds 1 to reduce[t, t % (Ci/g)], t counted within its group: the parameter is then the
    deviation from an identity 1x1, which is what the paper initialises it to and weight decay should pull it to.
    """

    origin: torch.Tensor | None = None
    avg: torch.Tensor | None = None
    prior: torch.Tensor | None = None
    pointwise: torch.Tensor | None = None
    reduce: torch.Tensor | None = None
    expand: torch.Tensor | None = None
    depthwise: torch.Tensor | None = None
    project: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    prior_filter: torch.Tensor | None = None
    groups: int = 1
    identity_reduce: bool = False

    @property
    def present(self) -> tuple[bool, ...]:
        """Which of the six branches exist, in the order of BRANCH_NAMES."""
        heads = (self.origin, self.avg, self.prior, self.expand, self.pointwise, self.project)
        return tuple(head is not None for head in heads)

    def scale_rows(self) -> list[torch.Tensor | None]:
        """The scale of each of the six branches, [Co]; None where the branch is absent or scales are ones."""
        if self.scale is None:
            return [None] * len(BRANCH_NAMES)
        return [None if at is None else self.scale[at] for at in self.scale_positions()]

    def scale_positions(self) -> list[int | None]:
        """The row of `scale` that belongs to each of the six branches."""
        rows = 0 if self.scale is None else self.scale.shape[0]
        compact = rows != len(BRANCH_NAMES)
        positions: list[int | None] = []
        for branch, here in enumerate(self.present):
            positions.append((sum(self.present[:branch]) if compact else branch) if here and rows else None)
        return positions


def kernel_shape(layer: SqueezeBranches) -> tuple[int, int, int, int]:
    """(Co, Ci/g, K, K) of the squeezed kernel. ValueError when the branches present do not determine it."""
    spatial = next(
        (t for t in (layer.origin, layer.expand, layer.depthwise, layer.prior_filter) if t is not None), None
    )
    input_side = (layer.origin, layer.avg, layer.prior, layer.pointwise, layer.reduce)
    channels = next((t for t in input_side if t is not None), None)
    output_side = (layer.origin, layer.avg, layer.prior, layer.pointwise, layer.expand)
    filters = next((t for t in output_side if t is not None), None)
    if spatial is None or channels is None or filters is None:
        names = [name for name, here in zip(BRANCH_NAMES, layer.present, strict=True) if here]
        raise ValueError(
            f"{OP}: the branches given ({', '.join(names) or 'none'}) do not determine [Co, Ci/g, K, K]; "
            "pass `origin` too, zeros will do"
        )
    for name, tensor, wanted in (
        ("spatial", spatial, (3, 4)),
        ("channel", channels, (2, 4)),
        ("filter", filters, (2, 4)),
        *((n, t, (2,)) for n, t in (("reduce", layer.reduce),) if t is not None),
        *((n, t, (3,)) for n, t in (("depthwise", layer.depthwise),) if t is not None),
    ):
        if tensor.dim() not in wanted:
            raise ValueError(f"{OP}: a {name} branch tensor has shape {tuple(tensor.shape)}, which no branch has")
    k = spatial.shape[-1]
    return (filters.shape[0], channels.shape[1], k, k)


def pack(layers: Sequence[SqueezeBranches]) -> tuple[list[torch.Tensor], list[int]]:
    """Flat tensors and three integers a layer, for the dispatcher."""
    tensors: list[torch.Tensor] = []
    layout: list[int] = []
    for layer in layers:
        mask = 0
        for bit, tensor in enumerate(layer[: len(TENSOR_FIELDS)]):
            if isinstance(tensor, torch.Tensor):
                tensors.append(tensor)
                mask |= 1 << bit
        layout += [mask, int(layer.groups), int(layer.identity_reduce)]
    return tensors, layout


def unpack(tensors: Sequence[torch.Tensor], layout: Sequence[int]) -> list[SqueezeBranches]:
    """The inverse of `pack`."""
    if len(layout) % INTS_PER_LAYER:
        raise ValueError(f"{OP}: layout must hold {INTS_PER_LAYER} integers a layer, got {len(layout)}")
    layers: list[SqueezeBranches] = []
    at = 0
    for start in range(0, len(layout), INTS_PER_LAYER):
        mask, groups, identity = layout[start : start + INTS_PER_LAYER]
        fields: list[Any] = []
        for bit in range(len(TENSOR_FIELDS)):
            if mask >> bit & 1:
                if at >= len(tensors):
                    raise ValueError(f"{OP}: layout names more tensors than the {len(tensors)} given")
                fields.append(tensors[at])
                at += 1
            else:
                fields.append(None)
        layers.append(SqueezeBranches(*fields, groups, bool(identity)))  # type: ignore[call-arg]
    if at != len(tensors):
        raise ValueError(f"{OP}: {len(tensors)} tensors were given but layout names {at}")
    return layers


def check_layers(tensors: Sequence[torch.Tensor], layout: Sequence[int]) -> list[SqueezeBranches]:
    """Unpack, and raise ValueError or TypeError for anything a kernel must not see."""
    layers = unpack(tensors, layout)
    if not layers:
        raise ValueError(f"{OP}: the list of layers is empty")
    named: dict[str, Any] = {f"tensor {i}": t for i, t in enumerate(tensors)}
    if any(t.dtype != tensors[0].dtype or t.device != tensors[0].device for t in tensors):
        named = {f"layers[{n}].{f}": t for n, la in enumerate(layers) for f, t in zip(TENSOR_FIELDS, la, strict=False)}
    _check.require_same(OP, named, (torch.float32, torch.float64))
    for layer in layers:
        _check_layer(layer)
    return layers


def _check_layer(layer: SqueezeBranches) -> None:
    co, cig, k, _ = kernel_shape(layer)
    g = layer.groups
    if g < 1:
        raise ValueError(f"{OP}: `groups` must be at least 1, got {g}")
    if co < 1 or cig < 1:
        raise ValueError(f"{OP}: channel counts must be at least 1, got Co={co}, Ci/g={cig}")
    if co % g:
        raise ValueError(f"{OP}: Co (={co}) must be divisible by `groups` (={g})")
    _check.require_odd(OP, "origin", k)
    for pair in (("reduce", "expand"), ("depthwise", "project"), ("prior", "prior_filter")):
        if (getattr(layer, pair[0]) is None) != (getattr(layer, pair[1]) is None):
            raise ValueError(f"{OP}: `{pair[0]}` and `{pair[1]}` belong to one branch: give both or neither")
    _check.require_fits(OP, "the bytes of the kernel", co, cig, k, k, 8)
    _check_shapes(layer, co, cig, k)


def _check_shapes(layer: SqueezeBranches, co: int, cig: int, k: int) -> None:
    g = layer.groups
    wanted: dict[str, tuple[int, ...]] = {"origin": (co, cig, k, k), "prior_filter": (co, k, k)}
    wanted |= dict.fromkeys(("avg", "prior", "pointwise"), (co, cig))
    if layer.reduce is not None:
        cm = layer.reduce.shape[0]
        if cm < 1 or cm % g:
            raise ValueError(f"{OP}: the internal channels Cm (={cm}) must be a positive multiple of `groups` (={g})")
        wanted |= {"reduce": (cm, cig), "expand": (co, cm // g, k, k)}
    if layer.depthwise is not None:
        ci, channels = cig * g, layer.depthwise.shape[0]
        if channels < 1 or channels % ci:
            raise ValueError(f"{OP}: `depthwise` must have a positive multiple of Ci (={ci}) channels, got {channels}")
        wanted |= {"depthwise": (channels, k, k), "project": (co, channels // g)}
    if layer.scale is not None:
        rows = layer.scale.shape[0] if layer.scale.dim() else 0
        allowed = (sum(layer.present), len(BRANCH_NAMES))
        if rows not in allowed:
            rows_wanted = " or ".join(map(str, sorted(set(allowed))))
            raise ValueError(f"{OP}: `scale` must have {rows_wanted} rows, got shape {tuple(layer.scale.shape)}")
        wanted["scale"] = (rows, co)
    for name, shape in wanted.items():
        tensor = getattr(layer, name)
        if tensor is not None:
            _check.require_shape(OP, name, tensor, shape)
