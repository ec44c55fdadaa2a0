"""RepVGG's custom L2: weight decay on the equivalent kernel instead of on each branch's."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from repkern.nn.fold import fuse_bn, identity_kernel

__all__ = ["custom_l2", "custom_l2_parameters", "equivalent_l2"]

KernelNorm = tuple[Tensor, nn.Module | None]


@runtime_checkable
class _HasCustomL2(Protocol):
    def custom_l2(self, *, include_identity: bool = ...) -> Tensor: ...

    def custom_l2_parameters(self) -> list[nn.Parameter]: ...


def _blocks(model: nn.Module) -> list[_HasCustomL2]:
    blocks: list[_HasCustomL2] = [module for module in model.modules() if isinstance(module, _HasCustomL2)]
    if not blocks:
        raise ValueError(
            f"custom_l2: {type(model).__name__} has no block with a custom L2 (RepVGGBlock, QARepVGGBlock)"
        )
    return blocks


def custom_l2(model: nn.Module, *, include_identity: bool | None = None) -> Tensor:
    """The sum over the model's RepVGG and QARepVGG blocks of their custom L2, a scalar with gradients.

    Per block: the sum of squares of the KxK kernel outside its centre, plus the sum of e^2 / (t3^2 + t1^2) with the
    equivalent kernel at the centre, e = K * t3 + P * t1; each term is the least a^2 + b^2 with a * t3 + b * t1 = e.
    K and P are the centre of the KxK kernel and the 1x1 kernel, t = gamma / sqrt(running variance + eps) the scales of
    their norms, taken as constants. As in the released RepVGG; QARepVGGBlock says what it does instead.
    include_identity: whether the identity branch is part of e. None: as released, which is False for RepVGG and True
    for QARepVGG.

    Use: loss + weight_decay / 2 * custom_l2(model), and no weight decay on `custom_l2_parameters(model)`.
    ValueError for a model without such blocks.
    """
    options = {} if include_identity is None else {"include_identity": include_identity}
    return torch.stack([block.custom_l2(**options) for block in _blocks(model)]).sum()


def custom_l2_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters whose weight decay `custom_l2(model)` replaces, each once: the kernels of the blocks' branches."""
    parameters = {id(p): p for block in _blocks(model) for p in block.custom_l2_parameters()}
    return list(parameters.values())


def norm_factor(norm: nn.Module, like: Tensor) -> Tensor:
    """gamma / sqrt(var + eps) [C, 1, 1, 1] in like's dtype, as a constant."""
    with torch.no_grad():
        ones = like.new_ones(like.shape[0], 1, 1, 1)
        return fuse_bn(ones, None, norm)[0]


def equivalent_l2(dense: KernelNorm, pointwise: KernelNorm | None, identity: nn.Module | None, groups: int) -> Tensor:
    """The custom L2 of one RepVGG block: (kernel, norm) of the KxK and the 1x1 branch, the norm of the identity."""
    kernel = dense[0]
    at = kernel.shape[-1] // 2
    centre = kernel[:, :, at : at + 1, at : at + 1]
    factors, equivalent = [], torch.zeros_like(centre)
    for weight, norm in [(centre, dense[1])] + ([] if pointwise is None else [pointwise]):
        assert norm is not None
        factors.append(norm_factor(norm, weight))
        equivalent = equivalent + weight * factors[-1]
    if identity is not None:
        diagonal = identity_kernel(kernel.shape[0], 1, groups, dtype=kernel.dtype, device=kernel.device)
        equivalent = equivalent + diagonal * norm_factor(identity, diagonal)
    scale = torch.stack(factors).square().sum(0)
    return kernel.square().sum() - centre.square().sum() + (equivalent.square() / scale).sum()
