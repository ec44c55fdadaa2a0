"""Pure algebra on (weight, bias): what folds a block into one convolution.

A weight is [Co, Ci/g, K, K], a bias [Co] or None (zero). Every function keeps dtype and device, is differentiable,
and changes nothing in place. Half precision is folded in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repkern.nn._affine_norm import affine_norm
from repkern.ops.compose_sequential import compose_sequential as _compose_kernels
from repkern.ops.orepa_squeeze.prior import dct_filter as dct_kernel

__all__ = [
    "KernelBias",
    "add_branches",
    "average_kernel",
    "compose_sequential",
    "dct_kernel",
    "depthwise_to_dense",
    "fuse_bn",
    "identity_kernel",
    "pad_to",
    "response_to_constant",
    "wide",
]

KernelBias = tuple[Tensor, Tensor | None]
_HALF = (torch.bfloat16, torch.float16)


def fuse_bn(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The convolution that computes norm(conv(x)) with the norm's running statistics.

    weight [Co, ...], bias [Co] or None, a norm over Co channels -> (weight of the same shape, bias [Co]):
    weight * t and beta + (bias - mean) * t with t = gamma / sqrt(var + eps).
    norm: a BatchNorm, or a frozen norm of another class (see `affine_norm`). ValueError for other norms, and for one
    without running statistics or over another number of channels.
    """
    try:
        gamma, beta, mean, var, eps = affine_norm(norm)
    except TypeError as problem:
        raise ValueError(f"fuse_bn: {problem}") from problem
    if mean is None or var is None:
        raise ValueError("fuse_bn: a norm without running statistics (track_running_stats=False) cannot be folded")
    if mean.shape != weight.shape[:1]:
        raise ValueError(f"fuse_bn: the norm has {mean.shape[0]} channels but the weight has {weight.shape[0]} outputs")
    wide = torch.float32 if weight.dtype in _HALF else weight.dtype
    factor = torch.rsqrt(var.to(wide) + eps)
    if gamma is not None:
        factor = factor * gamma.to(wide)
    shift = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
    shift = shift * factor
    if beta is not None:
        shift = shift + beta.to(wide)
    per_output = factor.reshape(-1, *[1] * (weight.dim() - 1))
    return (weight.to(wide) * per_output).to(weight.dtype), shift.to(weight.dtype)


def wide(weight: Tensor) -> Tensor:
    """The kernel in the dtype that branches are folded in: at least float32, so that half types round once."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def add_branches(branches: Sequence[KernelBias]) -> KernelBias:
    """The sum of parallel convolutions: weights of one shape [Co, Ci/g, K, K] are added, and so are the biases."""
    if not branches:
        raise ValueError("add_branches: at least one (weight, bias) is needed")
    weight, bias = branches[0]
    for other, other_bias in branches[1:]:
        if other.shape != weight.shape:
            raise ValueError(
                f"add_branches: weights must share one shape, got {tuple(weight.shape)} and {tuple(other.shape)}; "
                "use pad_to for smaller kernels"
            )
        weight = weight + other
        if bias is not None and other_bias is not None:
            bias = bias + other_bias
        elif bias is None:
            bias = other_bias
    return weight, bias


def pad_to(weight: Tensor, kernel_size: int) -> Tensor:
    """[Co, Ci/g, K, K] -> [Co, Ci/g, kernel_size, kernel_size], centred between zeros.

    ValueError when the kernel is larger than asked for or the two sizes have no common centre.
    """
    extra = kernel_size - weight.shape[-1]
    if extra < 0 or extra % 2 or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"pad_to: a {tuple(weight.shape[-2:])} kernel has no centred place in size {kernel_size}")
    return torch.nn.functional.pad(weight, [extra // 2] * 4)


def compose_sequential(first: KernelBias, second: KernelBias, *, groups: int = 1) -> KernelBias:
    """The convolution that computes second(first(x)) without padding in between.

    first: ([Cm, Ci/g, K1, K1], [Cm] or None); second: ([Co, Cm/g, K2, K2], [Co] or None)
    -> ([Co, Ci/g, K1+K2-1, K1+K2-1], [Co] or None). The first bias passes through the sum of the second kernel's taps.
    """
    weight = _compose_kernels(first[0], second[0], groups=groups)
    if first[1] is None:
        return weight, second[1]
    through = response_to_constant(second[0], first[1], groups=groups)
    return weight, through if second[1] is None else through + second[1]


def response_to_constant(weight: Tensor, value: Tensor, *, groups: int = 1) -> Tensor:
    """What the convolution with weight [Co, Cm/g, K, K] makes of a map that is value [Cm] everywhere: [Co]."""
    taps, values = weight.shape[2] * weight.shape[3], value.unflatten(0, (groups, -1))
    if weight.is_contiguous():  # a product with the kernel as it lies is several times faster than a sum over its taps
        rows, columns = weight.flatten(1), values.repeat_interleave(taps, dim=1)
    else:
        rows, columns = weight.permute(0, 2, 3, 1).flatten(1), values.repeat(1, taps)
    return torch.matmul(rows.unflatten(0, (groups, -1)), columns[..., None]).flatten()


def identity_kernel(
    channels: int,
    kernel_size: int,
    groups: int = 1,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """[C, C/g, K, K]: the convolution (padding K // 2) that returns its input. K must be odd."""
    return _on_diagonal(channels, kernel_size, groups, dtype, device, centre_only=True)


def average_kernel(
    channels: int,
    kernel_size: int,
    groups: int = 1,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """[C, C/g, K, K]: average pooling (count_include_pad) as a convolution, 1 / K^2 where input and output meet."""
    return _on_diagonal(channels, kernel_size, groups, dtype, device, centre_only=False)


def _on_diagonal(
    channels: int,
    kernel_size: int,
    groups: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    *,
    centre_only: bool,
) -> Tensor:
    if groups < 1 or channels % groups:
        raise ValueError(f"channels (={channels}) must be divisible by groups (={groups})")
    if centre_only and kernel_size % 2 == 0:
        raise ValueError(f"an identity kernel needs a centre: kernel_size must be odd, got {kernel_size}")
    kernel = torch.zeros(channels, channels // groups, kernel_size, kernel_size, dtype=dtype, device=device)
    at = torch.arange(channels, device=device)
    if centre_only:
        kernel[at, at % (channels // groups), kernel_size // 2, kernel_size // 2] = 1
    else:
        kernel[at, at % (channels // groups)] = 1 / kernel_size**2
    return kernel


def depthwise_to_dense(weight: Tensor, in_channels: int, groups: int = 1) -> Tensor:
    """A depthwise kernel as one of `groups` groups: [Ci*e, 1, K, K] -> [Ci*e, Ci/groups, K, K], zero off its own input.

    `weight` is that of nn.Conv2d(Ci, Ci*e, K, groups=Ci): output channel i*e + q reads input i.
    ValueError when the channel counts do not divide.
    """
    outputs = weight.shape[0]
    if weight.dim() != 4 or weight.shape[1] != 1 or in_channels < 1 or outputs % in_channels:
        raise ValueError(
            f"depthwise_to_dense: weight must be [Ci*e, 1, K, K] with Ci={in_channels}, got {tuple(weight.shape)}"
        )
    if groups < 1 or in_channels % groups:
        raise ValueError(f"depthwise_to_dense: in_channels (={in_channels}) must be divisible by groups (={groups})")
    reads = torch.arange(outputs, device=weight.device) // (outputs // in_channels)
    columns = torch.arange(in_channels // groups, device=weight.device)
    own = reads[:, None] % (in_channels // groups) == columns
    return weight * own[:, :, None, None].to(weight.dtype)
