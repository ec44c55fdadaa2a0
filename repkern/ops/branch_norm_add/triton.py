"""branch_norm_add on Triton kernels: allocate, deal tiles to programs, launch. Shapes were checked before."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from repkern.ops import _check
from repkern.ops._check import pointer
from repkern.ops._triton import TL_DTYPE, argument_table, block_size, on_device, stored_dtype
from repkern.ops.branch_norm_add import triton_kernels as kernels
from repkern.ops.branch_norm_add.contract import AS_IS, BATCH, GIVEN, map_format, statistics_dtype

__all__ = [
    "branch_norm_add",
    "branch_norm_add_backward",
    "branch_norm_statistics",
    "branch_norm_statistics_backward",
    "branch_norm_sums",
]

_TILE = 1024  # values of a map in a tile
_WANTED_PROGRAMS = 1024
_STEPS_PER_SPLIT = (4, 64)  # tiles a program adds up: at least, at most
_MOST_POSITIONS = 2**31
_LINE = 128  # channels handled by a program of per-channel work


class _Geometry(NamedTuple):
    """A map [N, C, H, W] in tiles, in the layout of the call."""

    channels: int
    plane: int
    positions: int
    channels_last: bool
    pos: int
    ch: int

    @property
    def tiles_c(self) -> int:
        return triton.cdiv(self.channels, self.ch)

    @property
    def tiles(self) -> int:
        return self.tiles_c * triton.cdiv(self.positions, self.pos)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.channels, self.plane, self.positions

    def splits(self, maps: int) -> tuple[int, int]:
        """How many programs share a channel's sums in each of `maps` maps, and the positions of each."""
        steps = triton.cdiv(self.positions, self.pos)
        least, most = _STEPS_PER_SPLIT
        splits = min(triton.cdiv(_WANTED_PROGRAMS, self.tiles_c * maps), triton.cdiv(steps, least))
        splits = max(splits, triton.cdiv(steps, most))
        per_split = triton.cdiv(steps, splits) * self.pos
        return triton.cdiv(self.positions, per_split), per_split


def _geometry(y: Tensor) -> _Geometry:
    n, channels, height, width = y.shape
    positions = n * height * width
    if positions >= _MOST_POSITIONS:
        raise RuntimeError(f"branch_norm_add: a channel of {positions} values is too long for the Triton kernels")
    channels_last = map_format(y) is torch.channels_last or height * width == 1
    if channels_last:
        ch = block_size(channels, 1, 64)
        pos = block_size(positions, 1, _TILE // ch)
    else:
        pos = block_size(positions, 1, _TILE)
        ch = block_size(channels, 1, _TILE // pos)
    return _Geometry(channels, height * width, positions, channels_last, pos, ch)


class _Call:
    """The maps in one layout and the table of what every branch has."""

    def __init__(self, branches: Sequence[Tensor], modes: Sequence[int], grad: Tensor | None = None) -> None:
        self.format = map_format(branches[0])
        self.maps = [y.contiguous(memory_format=self.format) for y in branches]
        first = self.maps[0]
        self.modes = list(modes)
        self.dtype, self.wide, self.device = first.dtype, statistics_dtype(first.dtype), first.device
        self.stored = stored_dtype(self.wide, self.dtype)
        self.grid = _geometry(first)
        self.grad = None if grad is None else grad.contiguous(memory_format=self.format)
        self.rows: list[dict[str, int]] = [{"mode": m, "y": pointer(y)} for m, y in zip(modes, self.maps, strict=True)]
        norms = [row for row, mode in zip(self.rows, modes, strict=True) if mode != AS_IS]
        for slot, row in enumerate(norms):
            row["slot"] = slot
        self.norms = len(norms)
        self._kept: list[Tensor] = []

    def set(self, column: str, tensors: Sequence[Tensor], *modes: int) -> None:
        """Addresses of `tensors`, one for each branch of `modes`."""
        rows = (row for row, mode in zip(self.rows, self.modes, strict=True) if mode in modes)
        for row, tensor in zip(rows, tensors, strict=True):
            kept = tensor.contiguous()
            self._kept.append(kept)
            row[column] = pointer(kept)

    def set_parameters(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        mean: Tensor,
        var: Tensor,
        eps: Sequence[float],
    ) -> None:
        self.set("weight", weights, BATCH, GIVEN)
        self.set("bias", biases, BATCH, GIVEN)
        self.set("mean", means, GIVEN)
        self.set("var", variances, GIVEN)
        self.set("mean", list(mean), BATCH)
        self.set("var", list(var), BATCH)
        norms = (row for row, mode in zip(self.rows, self.modes, strict=True) if mode != AS_IS)
        for row, value in zip(norms, eps, strict=True):
            row["eps"] = struct.unpack("<q", struct.pack("<d", value))[0]
        self.param = weights[0].dtype if len(weights) > 0 else self.wide

    def table(self, *modes: int) -> Tensor:
        """On the device; of the branches of `modes` only, if given."""
        rows = [row for row, mode in zip(self.rows, self.modes, strict=True) if not modes or mode in modes]
        table, _ = argument_table(rows, kernels.COLUMNS, self.device)
        return table

    def empty(self, *shape: int) -> Tensor:
        return _check.empty(shape, self.wide, self.device)

    def empty_map(self) -> Tensor:
        return _check.empty(tuple(self.maps[0].shape), self.stored, self.device, self.format)

    @property
    def types(self) -> tuple[Any, Any]:
        return TL_DTYPE[self.dtype], TL_DTYPE[self.wide]

    @property
    def programs_c(self) -> int:
        """Programs of per-channel work."""
        return triton.cdiv(self.grid.channels, _LINE)


def branch_norm_statistics(branches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every branch: two [B, C]."""
    call = _Call(branches, [BATCH] * len(branches))
    return _statistics(call)


def _statistics(call: _Call) -> tuple[Tensor, Tensor]:
    grid, maps = call.grid, call.modes.count(BATCH)
    mean, var = call.empty(maps, grid.channels), call.empty(maps, grid.channels)
    if maps == 0:
        return mean, var
    call.set("mean", list(mean), BATCH)
    call.set("var", list(var), BATCH)
    splits, per_split = grid.splits(maps)
    parts = call.empty(maps, splits, 3, grid.channels)
    table = call.table(BATCH)
    with on_device(call.device):
        kernels.moments_kernel[(grid.tiles_c * splits * maps,)](
            table, parts, *grid.sizes, splits, per_split, *call.types, grid.channels_last, grid.pos, grid.ch
        )
        kernels.merge_moments_kernel[(call.programs_c * maps,)](
            table, parts, splits, grid.channels, grid.plane, *call.types, grid.channels_last, _LINE
        )
    return mean, var


def branch_norm_statistics_backward(
    grad_mean: Tensor, grad_var: Tensor, branches: Sequence[Tensor], mean: Tensor
) -> list[Tensor]:
    """Gradients of the branches for those of `branch_norm_statistics`' outputs."""
    call = _Call(branches, [BATCH] * len(branches))
    call.set("mean", list(mean), BATCH)
    grads = [call.empty_map() for _ in branches]
    for row, grad in zip(call.rows, grads, strict=True):
        row["grad"] = pointer(grad)
    grid = call.grid
    with on_device(call.device):
        kernels.statistics_backward_kernel[(grid.tiles * len(branches),)](
            call.table(), grad_mean.contiguous(), grad_var.contiguous(), *grid.sizes,
            *call.types, TL_DTYPE[call.stored], grid.channels_last, grid.pos, grid.ch,
        )  # fmt: skip
    return [grad.to(call.dtype) for grad in grads]


def branch_norm_add(
    branches: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    modes: Sequence[int],
    eps: Sequence[float],
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [N, C, H, W], mean and biased variance [B0, C] of the branches of mode batch."""
    call = _Call(branches, modes)
    mean, var = _statistics(call)
    call.set_parameters(weights, biases, means, variances, mean, var, eps)
    out, grid = call.empty_map(), call.grid
    table = call.table()
    coefficients, shift = _coefficients(call, table)
    with on_device(call.device):
        kernels.sum_kernel[(grid.tiles,)](
            table, coefficients, shift, out, len(branches), *grid.sizes,
            *call.types, grid.channels_last, activation, grid.pos, grid.ch,
        )  # fmt: skip
    return out.to(call.dtype), mean, var


def _coefficients(call: _Call, table: Tensor) -> tuple[Tensor, Tensor]:
    channels, branches = call.grid.channels, len(call.maps)
    coefficients, shift = call.empty(3, branches, channels), call.empty(channels)
    with on_device(call.device):
        kernels.coefficients_kernel[(call.programs_c,)](
            table, coefficients, shift, branches, channels, TL_DTYPE[call.wide], TL_DTYPE[call.param], _LINE
        )
    return coefficients, shift


def branch_norm_sums(
    grad: Tensor,
    branches: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    modes: Sequence[int],
    eps: Sequence[float],
    activation: int,
) -> Tensor:
    """[1 + Bn, C]: the sum of dz, then the sum of dz * xhat of every branch with a norm."""
    call = _Call(branches, modes, grad)
    call.set_parameters(weights, biases, means, variances, mean, var, eps)
    table = call.table()
    return _sums(call, table, *_coefficients(call, table), activation)


def _sums(call: _Call, table: Tensor, coefficients: Tensor, shift: Tensor, activation: int) -> Tensor:
    grid, count = call.grid, 1 + call.norms
    splits, per_split = grid.splits(1)
    sums = call.empty(count, grid.channels)
    parts = sums if splits == 1 else call.empty(splits, count, grid.channels)
    with on_device(call.device):
        kernels.sums_kernel[(grid.tiles_c * splits,)](
            table, coefficients, shift, call.grad, parts, len(call.maps), call.norms, *grid.sizes, splits, per_split,
            *call.types, grid.channels_last, activation, block_size(count, 1, 32), grid.pos, grid.ch,
        )  # fmt: skip
        if splits > 1:
            kernels.merge_sums_kernel[(triton.cdiv(sums.numel(), _LINE),)](
                parts, sums, sums.numel(), splits, TL_DTYPE[call.wide], _LINE
            )
    return sums


def branch_norm_add_backward(
    grad: Tensor,
    branches: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    sums: Tensor | None,
    count: Tensor | None,
    modes: Sequence[int],
    eps: Sequence[float],
    activation: int,
) -> list[Tensor]:
    """Gradients of every branch with a norm, of the others (one tensor, if any), of weights [Bn, C], of biases [C]."""
    call = _Call(branches, modes, grad)
    grid = call.grid
    call.set_parameters(weights, biases, means, variances, mean, var, eps)
    grads = [call.empty_map() for _ in range(call.norms + (AS_IS in modes))]
    norms = (row for row, mode in zip(call.rows, modes, strict=True) if mode != AS_IS)
    for row, made in zip(norms, grads, strict=False):
        row["grad"] = pointer(made)
    table = call.table()
    coefficients, shift = _coefficients(call, table)
    sums = _sums(call, table, coefficients, shift, activation) if sums is None else sums.contiguous()
    count = torch.full((1,), grid.positions, dtype=call.wide, device=call.device) if count is None else count
    slopes = call.empty(2, len(branches), grid.channels)
    parameters = stored_dtype(call.wide, call.param)
    grad_weight = _check.empty((call.norms, grid.channels), parameters, call.device)
    grad_bias = _check.empty((grid.channels,), parameters, call.device)
    with on_device(call.device):
        kernels.slopes_kernel[(call.programs_c,)](
            table, coefficients, sums, count, slopes, grad_weight, grad_bias, len(branches), grid.channels,
            TL_DTYPE[call.wide], _LINE,
        )  # fmt: skip
        kernels.gradients_kernel[(grid.tiles,)](
            table, coefficients, shift, slopes, call.grad, grads[-1], len(branches), *grid.sizes,
            *call.types, TL_DTYPE[call.stored], grid.channels_last, activation, AS_IS in modes, grid.pos, grid.ch,
        )  # fmt: skip
    return [*(made.to(call.dtype) for made in grads), grad_weight.to(call.param), grad_bias.to(call.param)]
