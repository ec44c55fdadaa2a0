"""The Rule of Initialization: a plain kernel that starts as its CSLA block would (paper 2205.15242, Eq. 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repkern.nn.fold import identity_kernel, pad_to

__all__ = ["csla_kernel", "initialize_kernel", "pointwise_start"]


def csla_kernel(
    dense: Tensor,
    conv_scale: Tensor,
    pointwise: Tensor | None = None,
    pointwise_scale: Tensor | None = None,
    identity_scale: Tensor | None = None,
    *,
    groups: int = 1,
) -> Tensor:
    """The kernel [Co, Ci/g, K, K] of a CSLA block: s * W + pad(t * W_1x1) + pad(diag(identity_scale)).

    dense [Co, Ci/g, K, K], pointwise [Co, Ci/g, 1, 1], the scales [Co]; None for a branch that is not there. Keeps
    dtype and device of `dense`.
    """

    def rows(scale: Tensor) -> Tensor:
        return scale.to(dense.device, dense.dtype)[:, None, None, None]

    size = dense.shape[-1]
    kernel = rows(conv_scale) * dense
    if pointwise is not None:
        if pointwise_scale is None:
            raise ValueError("csla_kernel: a pointwise kernel needs its pointwise_scale")
        kernel = kernel + pad_to(rows(pointwise_scale) * pointwise, size)
    if identity_scale is not None:
        eye = identity_kernel(dense.shape[0], size, groups, dtype=dense.dtype, device=dense.device)
        kernel = kernel + rows(identity_scale) * eye
    return kernel


def pointwise_start(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The first values [Co, Ci/g, 1, 1] of a 1x1 convolution beside `weight` [Co, Ci/g, K, K], as nn.Conv2d's.

    Drawn on the CPU, so that a seed gives the same on every device.
    """
    bound = 1 / math.sqrt(weight.shape[1])
    drawn = torch.empty(*weight.shape[:2], 1, 1).uniform_(-bound, bound, generator=generator)
    return drawn.to(weight.device, weight.dtype)


@torch.no_grad()
def initialize_kernel(
    weight: Tensor,
    conv_scale: Tensor,
    pointwise_scale: Tensor | None = None,
    identity_scale: Tensor | None = None,
    *,
    groups: int = 1,
    generator: torch.Generator | None = None,
) -> None:
    """Make `weight` [Co, Ci/g, K, K], which holds a fresh K x K kernel, the start of its CSLA block, in place.

    The 1x1 kernel is drawn anew when there is a pointwise_scale. identity_scale [Co]: ones in the paper, or the trained
    ones of the search; None for a block without an identity.
    """
    pointwise = None if pointwise_scale is None else pointwise_start(weight, generator)
    weight.copy_(csla_kernel(weight, conv_scale, pointwise, pointwise_scale, identity_scale, groups=groups))
