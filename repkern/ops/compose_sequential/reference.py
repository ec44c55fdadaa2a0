"""compose_sequential in plain torch: the meaning. The math is in docs/ops/compose_sequential.md."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compose_sequential", "compose_sequential_backward"]


def _per_group(tensor: Tensor, groups: int) -> Tensor:
    return tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def compose_sequential(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """W[o, i, a + b] += second[o, t, a] first[t, i, b]: [Co, Ci/g, K1 + K2 - 1, K1 + K2 - 1]."""
    k2 = second.shape[-1]
    one, two = _per_group(first, groups), _per_group(second, groups)
    total: Tensor | None = None
    # Nothing is changed in place, so that torch.func can transform this.
    for a in range(k2):
        for b in range(k2):
            product = torch.einsum("got,gtihw->goihw", two[..., a, b], one)
            placed = torch.nn.functional.pad(product, (b, k2 - 1 - b, a, k2 - 1 - a))
            total = placed if total is None else total + placed
    assert total is not None
    return total.flatten(0, 1)


def compose_sequential_backward(grad: Tensor, first: Tensor, second: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Gradients of `first` and `second`."""
    k1, k2 = first.shape[-1], second.shape[-1]
    one, two, outer = (_per_group(t, groups) for t in (first, second, grad))
    grad_first: Tensor | None = None
    of_taps: list[Tensor] = []
    for a in range(k2):
        for b in range(k2):
            window = outer[..., a : a + k1, b : b + k1]
            product = torch.einsum("got,goihw->gtihw", two[..., a, b], window)
            grad_first = product if grad_first is None else grad_first + product
            of_taps.append(torch.einsum("gtihw,goihw->got", one, window))
    assert grad_first is not None
    grad_second = torch.stack(of_taps, -1).unflatten(-1, (k2, k2))
    return grad_first.flatten(0, 1), grad_second.flatten(0, 1).contiguous()
