"""What batch norms do to their input now, and their running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repkern.nn.sync_norm import synced_branch_norm_add
from repkern.ops import Norm

__all__ = ["SYNCHRONIZED", "SyncBatchNorm", "is_plain", "sync_group", "untouched", "update_running", "uses_batch"]

_has_global_hook = torch.nn.modules.module._has_any_global_hook


class SyncBatchNorm(_BatchNorm):
    """torch's SyncBatchNorm, which works on GPUs only, on the CPU as well. Input [N, C, ...] of any size.

    Not a subclass: DistributedDataParallel refuses those on the CPU.
    """

    process_group: Any = None  # all processes

    _check_input_dim: Any = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels: Any = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        """As torch's, with the statistics of all processes in train mode."""
        group = sync_group(self)
        if group is None or input.device.type != "cpu":
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        maps = input if input.dim() == 4 else input.reshape(*input.shape[:2], -1, 1)
        norm = Norm(self.weight, self.bias, eps=self.eps)
        out, mean, var, count = synced_branch_norm_add([maps], [norm], "none", group)
        update_running([self], mean, var, count)
        return out.view_as(input)


#: Norms that share their statistics over processes.
SYNCHRONIZED = (nn.SyncBatchNorm, SyncBatchNorm)
_PLAIN = (nn.BatchNorm2d, *SYNCHRONIZED)


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
    """Whether this is torch's own BatchNorm2d or a SyncBatchNorm, called as it is."""
    return type(norm) in _PLAIN and untouched(norm)


def uses_batch(norm: Any) -> bool:
    """Whether it normalizes with the batch's statistics (torch's rule), not with the running ones."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def sync_group(norm: Any) -> Any:
    """The process group over which the batch is spread, None for this process alone."""
    if type(norm) not in SYNCHRONIZED or not norm.training:
        return None
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = distributed.group.WORLD if norm.process_group is None else norm.process_group
    return group if distributed.get_world_size(group) > 1 else None


def update_running(norms: Sequence[Any], mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """Running statistics after a batch: mean and biased var [B, C] of the norms' maps, `count` values a channel.

    mean and var must not require gradients.
    """
    means, variances = mean.unbind(0), (var * (count / (count - 1))).unbind(0)
    counters: list[Tensor] = []
    by_momentum: dict[float | None, tuple[list[Tensor], list[Tensor]]] = {}
    for row, norm in enumerate(norms):
        if not (norm.training and norm.track_running_stats):
            continue
        if norm.num_batches_tracked is not None:
            counters.append(norm.num_batches_tracked)
        olds, news = by_momentum.setdefault(norm.momentum, ([], []))
        for running, new in ((norm.running_mean, means[row]), (norm.running_var, variances[row])):
            if running is not None:
                olds.append(running)
                news.append(new if new.dtype == running.dtype else new.to(running.dtype))
    # One call for all norms of a block: with a call each, these small ops cost more than a small block's kernel.
    if counters:
        torch._foreach_add_(counters, 1)
    for momentum, (olds, news) in by_momentum.items():
        if momentum is not None and olds:
            torch._foreach_lerp_(olds, news, momentum)
    if None in by_momentum:
        _update_cumulative(norms, means, variances)


def _update_cumulative(norms: Sequence[Any], means: Sequence[Tensor], variances: Sequence[Tensor]) -> None:
    """The norms whose running statistics are the mean over all batches so far."""
    for norm, mean, var in zip(norms, means, variances, strict=True):
        if norm.momentum is not None or not (norm.training and norm.track_running_stats):
            continue
        share = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
        norm.running_mean.lerp_(mean.to(share.dtype), share)
        norm.running_var.lerp_(var.to(share.dtype), share)
