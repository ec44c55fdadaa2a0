"""GradMult: the constants by which a RepOptimizer multiplies the gradient of one convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["GradMult", "Parts"]

#: Multiplier of every entry [Co], of the centre on top of it [Co] or None, and of the centre's diagonal.
Parts = tuple[Tensor, Tensor | None, float]

_Vector = Tensor | Sequence[float]


class GradMult:
    """The scales of the CSLA block that a K x K convolution stands for (RepOptimizers, paper 2205.15242, Eq. 3).

    conv_scale [Co]: after the K x K branch; pointwise_scale [Co]: after the 1x1 branch, None without one; identity:
    whether the block has an identity branch; groups: of the convolution. Any dtype; kept as copies, on the CPU.
    What the gradient is multiplied by follows from them and the optimizer: s^2 + t^2 at the centre + 1 on its diagonal
    for SGD, and |s| + |t| + 1 in the update of AdamW. `dense` shows it; the optimizers never make that tensor.
    Immutable; equal when the scales are. TypeError or ValueError, naming value and channel, for scales that are not
    finite, of another length, or 0 in `conv_scale`, where a kernel would never train.
    """

    __slots__ = ("conv_scale", "groups", "identity", "pointwise_scale")

    conv_scale: Tensor
    pointwise_scale: Tensor | None
    identity: bool
    groups: int

    def __init__(
        self, conv_scale: _Vector, pointwise_scale: _Vector | None = None, identity: bool = False, groups: int = 1
    ) -> None:
        conv = _vector("conv_scale", conv_scale)
        pointwise = None if pointwise_scale is None else _vector("pointwise_scale", pointwise_scale)
        if pointwise is not None and len(pointwise) != len(conv):
            raise ValueError(f"pointwise_scale must be [{len(conv)}], as conv_scale, got [{len(pointwise)}]")
        if not conv.all():
            channel = int((conv == 0).nonzero()[0])
            raise ValueError(f"conv_scale is 0 for channel {channel}: its kernel would never change")
        if not isinstance(identity, bool):
            raise TypeError(f"identity must be True or False (the branch's own scale does not enter), got {identity!r}")
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or len(conv) % groups:
            raise ValueError(f"groups must divide the {len(conv)} channels, got {groups!r}")
        for name, value in zip(self.__slots__, (conv, groups, identity, pointwise), strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a GradMult does not change; make a new one to set {name}")

    def parts(self, power: int, *, released: bool = False) -> Parts:
        """The multiplier as numbers per channel. power: 2 for SGD, 1 for AdamW.

        The power of every branch's scale is taken before they are added; with power 1 that is the absolute value, since
        Adam's update knows no size of a gradient but its sign. released: the signed sum of the released code instead.
        """
        if power not in (1, 2):
            raise ValueError(f"power must be 2 (SGD) or 1 (AdamW), got {power!r}")

        def raised(scale: Tensor) -> Tensor:
            if power == 2:
                return scale.square()
            return scale.clone() if released else scale.abs()

        centre = None if self.pointwise_scale is None else raised(self.pointwise_scale)
        return raised(self.conv_scale), centre, float(self.identity)

    def check(self, shape: Sequence[int]) -> None:
        """ValueError unless a convolution's weight [Co, Ci/g, K, K] of this shape can have these scales."""
        shape, channels = tuple(shape), len(self.conv_scale)
        if len(shape) != 4:
            raise ValueError(f"a GradMult is for the weight [Co, Ci/g, K, K] of a convolution, got {shape}")
        if shape[0] != channels:
            raise ValueError(f"conv_scale has {channels} channels, but the weight {shape} has {shape[0]} outputs")
        if shape[2] != shape[3] or shape[2] % 2 == 0:
            raise ValueError(f"a GradMult needs a kernel with a centre (odd and square), got {shape}")
        if self.identity and shape[1] * self.groups != channels:
            raise ValueError(
                f"an identity needs as many inputs as outputs: {shape[1]} inputs x {self.groups} groups in {shape} are "
                f"not {channels}"
            )

    def dense(self, shape: Sequence[int], power: int = 2, *, released: bool = False) -> Tensor:
        """The multiplier as a tensor [Co, Ci/g, K, K] of that shape, to look at (paper, Eq. 3)."""
        self.check(shape)
        scale, centre, diagonal = self.parts(power, released=released)
        full = scale[:, None, None, None].expand(*shape).clone()
        at = shape[2] // 2
        if centre is not None:
            full[:, :, at, at] += centre[:, None]
        if diagonal:
            outputs = torch.arange(shape[0])
            full[outputs, outputs % shape[1], at, at] += diagonal
        return full

    def to_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, for a checkpoint; `from_dict` makes it again."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GradMult:
        """The inverse of `to_dict`. ValueError for something else."""
        if set(values) != set(cls.__slots__):
            raise ValueError(f"a GradMult is {', '.join(cls.__slots__)}, got {', '.join(map(str, values))}")
        return cls(**values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GradMult):
            return NotImplemented
        mine, theirs = self.pointwise_scale, other.pointwise_scale
        return (
            (self.identity, self.groups) == (other.identity, other.groups)
            and torch.equal(self.conv_scale, other.conv_scale)
            and (mine is None) == (theirs is None)
            and (mine is None or theirs is None or torch.equal(mine, theirs))
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return GradMult, (self.conv_scale, self.pointwise_scale, self.identity, self.groups)

    def __repr__(self) -> str:
        scales = [f"conv_scale={_range(self.conv_scale)}"]
        if self.pointwise_scale is not None:
            scales.append(f"pointwise_scale={_range(self.pointwise_scale)}")
        return f"GradMult([{len(self.conv_scale)}] {', '.join(scales)}, identity={self.identity}, groups={self.groups})"


def _vector(name: str, values: _Vector) -> Tensor:
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(list(values))
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be a vector of numbers, got {values!r}") from None
    if values.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {values.layout}")
    scale = values.detach().to("cpu", copy=True)
    if scale.dim() != 1 or not len(scale):
        raise ValueError(f"{name} must be a vector with one number per output channel, got shape {tuple(scale.shape)}")
    if not scale.is_floating_point():
        if scale.is_complex() or scale.dtype == torch.bool:
            raise TypeError(f"{name} must hold real numbers, got {scale.dtype}")
        scale = scale.to(torch.get_default_dtype())
    if scale.dtype in (torch.float16, torch.bfloat16):
        scale = scale.float()
    finite = torch.isfinite(scale)
    if not finite.all():
        channel = int((~finite).nonzero()[0])
        raise ValueError(f"{name} is {scale[channel].item()} for channel {channel}")
    return scale


def _range(scale: Tensor) -> str:
    return f"{scale.min().item():.3g}..{scale.max().item():.3g}"
