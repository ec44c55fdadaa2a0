"""What batch norms do to their input now, and their running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

__all__ = ["is_plain", "sync_group", "untouched", "update_running", "uses_batch"]

_PLAIN = (nn.BatchNorm2d, nn.SyncBatchNorm)
_has_global_hook = torch.nn.modules.module._has_any_global_hook


def untouched(module: nn.Module) -> bool:
    """Whether calling the module does nothing but its class's forward: no hooks, no forward of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_global_hook()
    )


def is_plain(norm: nn.Module) -> bool:
    """Whether this is torch's own BatchNorm2d or SyncBatchNorm, called as it is."""
    return type(norm) in _PLAIN and untouched(norm)


def uses_batch(norm: Any) -> bool:
    """Whether it normalizes with the batch's statistics (torch's rule), not with the running ones."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def sync_group(norm: Any) -> Any:
    """The process group over which the batch is spread, None for this process alone."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training:
        return None
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = distributed.group.WORLD if norm.process_group is None else norm.process_group
    return group if distributed.get_world_size(group) > 1 else None


@torch.no_grad()
def update_running(norms: Sequence[Any], mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """Running statistics after a batch: mean and biased var [B, C] of the norms' maps, `count` values a channel."""
    tracking = [(row, norm) for row, norm in enumerate(norms) if norm.training and norm.track_running_stats]
    if not tracking:
        return
    counters = [norm.num_batches_tracked for _, norm in tracking if norm.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    means, variances = mean.unbind(0), (var * (count / (count - 1))).unbind(0)
    by_momentum: dict[float | None, tuple[list[Tensor], list[Tensor]]] = {}
    for row, norm in tracking:
        for running, new in ((norm.running_mean, means[row]), (norm.running_var, variances[row])):
            if running is None:
                continue
            new = new if new.dtype == running.dtype else new.to(running.dtype)
            if norm.momentum is None:
                running.lerp_(new, norm.num_batches_tracked.to(running.dtype).reciprocal())
                continue
            olds, news = by_momentum.setdefault(norm.momentum, ([], []))
            olds.append(running)
            news.append(new)
    for momentum, (olds, news) in by_momentum.items():
        assert momentum is not None
        torch._foreach_lerp_(olds, news, momentum)
