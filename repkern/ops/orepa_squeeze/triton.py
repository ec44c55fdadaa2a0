"""orepa_squeeze on Triton kernels: allocate, plan the tiles, launch. Shapes were checked before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from repkern.ops import _check
from repkern.ops._check import pointer
from repkern.ops._triton import (
    TL_DTYPE,
    argument_table,
    block_size,
    contraction_size,
    dot_precision,
    launch_options,
    on_device,
    stored_dtype,
)
from repkern.ops.orepa_squeeze import triton_kernels as kernels
from repkern.ops.orepa_squeeze.layers import GRADIENT_FIELDS, SqueezeBranches, kernel_shape, unpack
from repkern.ops.orepa_squeeze.triton_sums import PartialSums

__all__ = ["orepa_squeeze_many", "orepa_squeeze_many_backward"]

_SCALES = ("scale", "scale_avg", "scale_prior", "scale_expand", "scale_pointwise", "scale_project")
# Programs that a layer's d_reduce should give a GPU; below it the rows are split and the parts added afterwards.
_WANTED_PROGRAMS = 128
_LEAST_STEPS_PER_SPLIT = 4

_Fields = dict[str, int]


class _Tiles(NamedTuple):
    """Tile extents; layers with the same ones share a launch."""

    rows: int  # (output channel in its group, tap)
    inputs: int
    internal: int
    rest_outputs: int
    rest_inputs: int


def orepa_squeeze_many(
    tensors: Sequence[Tensor], layout: Sequence[int], out_dtype: torch.dtype | None, channels_last: bool
) -> list[Tensor]:
    """Every layer's kernel, [Co, Ci/g, K, K]; layers of like size in one launch."""
    tensors = [t.contiguous() for t in tensors]
    layers = unpack(tensors, layout)
    dtype, device = tensors[0].dtype, tensors[0].device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out_dtype = out_dtype or dtype
    stored, precision = stored_dtype(dtype, out_dtype), dot_precision(dtype)
    outputs = [_check.empty(kernel_shape(layer), stored, device, memory_format) for layer in layers]
    with on_device(device):
        for tiles, members in _by_tiles(layers, dtype).items():
            rows: list[_Fields] = []
            total = 0
            for n in members:
                rows.append(_layer_fields(layers[n]) | _kernel_fields(outputs[n]) | {"first_tile": total})
                total += _tile_count(rows[-1], tiles.rows, tiles.inputs)
            table, count = argument_table(rows, kernels.COLUMNS, device)
            kernels.forward_kernel[(total,)](
                table, count, TL_DTYPE[dtype], TL_DTYPE[stored], precision, tiles.rows, tiles.inputs,
                contraction_size(precision), **launch_options(tiles.rows, tiles.inputs),
            )  # fmt: skip
    return [kernel.to(out_dtype) for kernel in outputs]


def orepa_squeeze_many_backward(
    grads: Sequence[Tensor], tensors: Sequence[Tensor], layout: Sequence[int]
) -> list[Tensor]:
    """The gradient of every tensor but the prior filters. Each sum has a fixed order: the same bits every time."""
    tensors = [t.contiguous() for t in tensors]
    layers = unpack(tensors, layout)
    if any(grad.dtype != grads[0].dtype for grad in grads):
        grads = [grad.to(tensors[0].dtype) for grad in grads]
    grads = [_with_one_tap_stride(grad) for grad in grads]
    wanted = [_empty_gradients(layer) for layer in layers]
    with on_device(tensors[0].device):
        for tiles, members in _by_tiles(layers, tensors[0].dtype).items():
            _backward(tiles, [(grads[n], layers[n], wanted[n]) for n in members])
    return [gradient for gradients in wanted for gradient in gradients.values()]


def _backward(tiles: _Tiles, members: Sequence[tuple[Tensor, SqueezeBranches, dict[str, Tensor]]]) -> None:
    grad, _, some = members[0]
    dtype, device = next(iter(some.values())).dtype, grad.device
    sums = PartialSums(dtype, device)
    rows: list[_Fields] = []
    total = {"first_tile": 0, "first_reduce_tile": 0, "first_rest_tile": 0}
    for grad, layer, wanted in members:
        fields = _layer_fields(layer) | _kernel_fields(grad) | total
        fields |= {f"d_{name}": pointer(tensor) for name, tensor in wanted.items() if name != "scale"}
        for column, tiles_of_layer in _plan(tiles, fields, layer, wanted, sums).items():
            total[column] += tiles_of_layer
        rows.append(fields)
    sums.allocate()
    table, count = argument_table(rows, kernels.COLUMNS, device)
    types = (TL_DTYPE[dtype], TL_DTYPE[grad.dtype])
    precision = dot_precision(dtype)
    if total["first_tile"]:
        kernels.expand_kernel[(total["first_tile"],)](
            table, count, *types, precision, tiles.rows, tiles.internal, contraction_size(precision),
            **launch_options(tiles.rows, tiles.internal),
        )  # fmt: skip
        kernels.reduce_kernel[(total["first_reduce_tile"],)](
            table, count, *types, precision, tiles.internal, tiles.inputs, contraction_size(precision),
            **launch_options(tiles.internal, tiles.inputs),
        )  # fmt: skip
    kernels.rest_kernel[(total["first_rest_tile"],)](table, count, *types, tiles.rest_outputs, tiles.rest_inputs)
    sums.add_up()


def _plan(
    tiles: _Tiles, fields: _Fields, layer: SqueezeBranches, wanted: Mapping[str, Tensor], sums: PartialSums
) -> _Fields:
    """Tiles of this layer in each launch; enters in `sums` and `fields` what several tiles add up to."""
    co, cig, cmg, groups, taps = (fields[name] for name in ("co", "cig", "cmg", "groups", "taps"))
    expansion = fields["expansion"]
    tiles_i, tiles_o = triton.cdiv(cig, tiles.rest_inputs), triton.cdiv(co // groups, tiles.rest_outputs)
    shares = [tiles_i, tiles_i, tiles_i, taps * triton.cdiv(cmg, tiles.internal), tiles_i, tiles_i * expansion]
    for name, target, terms in zip(_SCALES, _scale_pointers(wanted.get("scale"), layer), shares, strict=True):
        sums.add(fields, f"d_{name}", target, co, terms, terms_apart=1)
    sums.add(fields, "d_depthwise", fields.get("d_depthwise", 0), cig * groups * expansion * taps, tiles_o)
    counts = {"first_rest_tile": groups * tiles_o * tiles_i * (1 + expansion)}
    if cmg:
        per_split = groups * triton.cdiv(cmg, tiles.internal) * triton.cdiv(cig, tiles.inputs)
        step = contraction_size(dot_precision(wanted["reduce"].dtype))
        steps = triton.cdiv(co // groups * taps, step)
        splits = max(1, min(steps // _LEAST_STEPS_PER_SPLIT, _WANTED_PROGRAMS // per_split))
        fields["split_length"] = triton.cdiv(steps, splits) * step
        splits = triton.cdiv(co // groups * taps, fields["split_length"])
        sums.add(fields, "d_reduce", fields["d_reduce"], groups * cmg * cig, splits)
        counts["first_tile"] = _tile_count(fields, tiles.rows, tiles.internal, columns="cmg")
        counts["first_reduce_tile"] = splits * per_split
    return counts


def _by_tiles(layers: Sequence[SqueezeBranches], dtype: torch.dtype) -> dict[_Tiles, list[int]]:
    found: dict[_Tiles, list[int]] = {}
    for n, layer in enumerate(layers):
        found.setdefault(_tiles_of(layer, dtype), []).append(n)
    return found


def _tiles_of(layer: SqueezeBranches, dtype: torch.dtype) -> _Tiles:
    co, cig, k, _ = kernel_shape(layer)
    high = 16 if dtype is torch.float64 else 64
    internal = 1 if layer.reduce is None else layer.reduce.shape[0] // layer.groups
    return _Tiles(
        rows=block_size(co // layer.groups * k * k, 16, high),
        inputs=block_size(cig, 16, high),
        internal=block_size(internal, 16, high),
        rest_outputs=block_size(co // layer.groups, 1, 16),
        rest_inputs=block_size(cig, 1, 64),
    )


def _tile_count(fields: Mapping[str, int], rows: int, block: int, columns: str = "cig") -> int:
    tiles_r = triton.cdiv(fields["co"] // fields["groups"] * fields["taps"], rows)
    return fields["groups"] * tiles_r * triton.cdiv(fields[columns], block)


def _layer_fields(layer: SqueezeBranches) -> _Fields:
    co, cig, k, _ = kernel_shape(layer)
    fields = {"co": co, "cig": cig, "groups": layer.groups, "taps": k * k, "identity": int(layer.identity_reduce)}
    fields["cmg"] = 0 if layer.reduce is None else layer.reduce.shape[0] // layer.groups
    fields["expansion"] = 0 if layer.project is None else layer.project.shape[1] // cig
    for name in (*GRADIENT_FIELDS[:-1], "prior_filter"):
        fields[name] = pointer(getattr(layer, name))
    return fields | dict(zip(_SCALES, _scale_pointers(layer.scale, layer), strict=True))


def _kernel_fields(kernel: Tensor) -> _Fields:
    """Where a kernel or its gradient lies."""
    return {
        "kernel": pointer(kernel),
        "kernel_stride_o": kernel.stride(0),
        "kernel_stride_i": kernel.stride(1),
        "kernel_stride_tap": kernel.stride(3),
    }


def _with_one_tap_stride(grad: Tensor) -> Tensor:
    """`grad` itself when its K*K positions are evenly spaced, as in both memory formats, else a contiguous copy."""
    return grad if grad.stride(2) == grad.shape[3] * grad.stride(3) else grad.contiguous()


def _scale_pointers(scale: Tensor | None, layer: SqueezeBranches) -> list[int]:
    if scale is None:
        return [0] * len(_SCALES)
    row = scale.shape[1] * scale.element_size()
    return [0 if at is None else pointer(scale) + at * row for at in layer.scale_positions()]


def _empty_gradients(layer: SqueezeBranches) -> dict[str, Tensor]:
    gradients: dict[str, Tensor] = {}
    for name in GRADIENT_FIELDS:
        tensor: Any = getattr(layer, name)
        if tensor is not None:
            gradients[name] = _check.empty(tensor.shape, tensor.dtype, tensor.device)
    if layer.scale is not None and layer.scale.shape[0] != sum(layer.present):
        gradients["scale"].zero_()  # rows of absent branches
    return gradients
