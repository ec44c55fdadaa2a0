"""What the ops are compared with: the same mathematics as published code writes it, one torch call a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from repkern.ops import SqueezeBranches

__all__ = [
    "KernelFunction",
    "eager_branch_norm_add",
    "eager_compose",
    "eager_kernel_of",
    "eager_orepa_kernel",
    "identity_rows",
]

KernelFunction = Callable[..., Tensor]


def identity_rows(rows: int, columns: int, groups: int, like: Tensor) -> Tensor:
    """[rows, columns]: 1 at column t % columns of row t, t counted within its group."""
    at = torch.arange(rows, device=like.device) % (rows // groups) % columns
    return torch.nn.functional.one_hot(at, columns).to(like.dtype)


def eager_orepa_kernel(
    origin: Tensor,
    avg: Tensor,
    prior: Tensor,
    pointwise: Tensor,
    reduce: Tensor,
    expand: Tensor,
    depthwise: Tensor,
    project: Tensor,
    scale: Tensor,
    prior_filter: Tensor,
    average_filter: Tensor,
    identity: Tensor | None,
    groups: int,
) -> Tensor:
    """[Co, Ci/g, K, K]: six branches, each made, scaled and added by a call of its own (paper 2204.00826, Fig. 6)."""
    co, cig, k, _ = origin.shape
    kernel_origin = torch.einsum("oihw,o->oihw", origin, scale[0])
    kernel_avg = torch.einsum("oihw,o->oihw", torch.einsum("oi,hw->oihw", avg, average_filter), scale[1])
    kernel_prior = torch.einsum("oihw,o->oihw", torch.einsum("oi,ohw->oihw", prior, prior_filter), scale[2])
    product = _sequential(reduce if identity is None else reduce + identity, expand, groups)
    kernel_sequential = torch.einsum("oihw,o->oihw", product, scale[3])
    centred = torch.nn.functional.pad(pointwise.view(co, cig, 1, 1), [k // 2] * 4)
    kernel_pointwise = torch.einsum("oihw,o->oihw", centred, scale[4])
    separable = torch.einsum(
        "gitkl,goit->goikl",
        depthwise.view(groups, cig, -1, k, k),
        project.view(groups, co // groups, cig, -1),
    ).reshape(co, cig, k, k)
    kernel_separable = torch.einsum("oihw,o->oihw", separable, scale[5])
    return kernel_origin + kernel_avg + kernel_prior + kernel_sequential + kernel_pointwise + kernel_separable


def eager_orepa_1x1_kernel(
    origin: Tensor, reduce: Tensor, expand: Tensor, scale: Tensor, identity: Tensor | None, groups: int
) -> Tensor:
    """[Co, Ci/g, 1, 1]: Rep-1x1, the origin and 1x1-1x1 branches."""
    product = _sequential(reduce if identity is None else reduce + identity, expand, groups)
    return torch.einsum("oihw,o->oihw", origin, scale[0]) + torch.einsum("oihw,o->oihw", product, scale[1])


def _sequential(reduce: Tensor, expand: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return torch.einsum("ti,othw->oihw", reduce, expand)
    grouped_reduce = reduce.view(groups, -1, reduce.shape[1])
    grouped_expand = expand.view(groups, -1, *expand.shape[1:])
    return torch.einsum("gti,gothw->goihw", grouped_reduce, grouped_expand).flatten(0, 1)


def eager_compose(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """compose_sequential as one convolution of the kernels: the full convolution, not the correlation."""
    padding = second.shape[-1] - 1
    return torch.conv2d(first.transpose(0, 1), second.flip(2, 3), padding=padding, groups=groups).transpose(0, 1)


def eager_branch_norm_add(branches: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """ReLU of a sum of BatchNorms in train mode, as a block's forward writes it."""
    functional = torch.nn.functional
    total = functional.batch_norm(branches[0], None, None, weights[0], biases[0], training=True)
    for y, weight, bias in zip(branches[1:], weights[1:], biases[1:], strict=True):
        total = total + functional.batch_norm(y, None, None, weight, bias, training=True)
    return functional.relu(total)


def eager_kernel_of(layer: SqueezeBranches, wrap: Callable[[KernelFunction], KernelFunction]) -> Callable[[], Tensor]:
    """A call that makes the kernel of `layer` the published way; constants are made once, as buffers would be.

    `wrap` is applied to the kernel function: the identity, or torch.compile. ValueError for a set of branches that
    published OREPA blocks do not have.
    """
    if layer.origin is None or layer.scale is None or layer.reduce is None or layer.expand is None:
        raise ValueError("the published formulation has scales and the origin and 1x1-KxK branches; this layer has not")
    rows, columns = layer.reduce.shape
    identity = identity_rows(rows, columns, layer.groups, layer.reduce) if layer.identity_reduce else None
    if sum(layer.present) == 2:
        small = wrap(eager_orepa_1x1_kernel)
        return lambda: small(layer.origin, layer.reduce, layer.expand, layer.scale, identity, layer.groups)
    if not all(layer.present):
        raise ValueError(f"the published formulation has two or six branches, this layer has {sum(layer.present)}")
    k = layer.origin.shape[-1]
    average_filter = torch.full((k, k), 1 / k**2, dtype=layer.origin.dtype, device=layer.origin.device)
    full = wrap(eager_orepa_kernel)
    return lambda: full(*layer[:10], average_filter, identity, layer.groups)
