"""synchronize_norms: the batch norms of a network share their statistics over all processes."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repkern.nn._norm_state import SYNCHRONIZED, SyncBatchNorm

__all__ = ["synchronize_norms"]

_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *SYNCHRONIZED)


def synchronize_norms(model: nn.Module) -> nn.Module:
    """Make every BatchNorm of `model` a `SyncBatchNorm`, in place: with several processes it normalizes with the
    statistics of the whole batch in train mode, on CPUs too.

    Parameters, buffers, their names and hooks stay; with one process nothing changes. Returns `model`. ValueError for
    a subclass with a forward of its own, which would be lost.
    """
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    for name, norm in norms:
        if type(norm) not in _KNOWN:
            raise ValueError(
                f"{name or 'the network'} is a {type(norm).__name__}, which cannot be synchronized: only torch's "
                "BatchNorm1d, BatchNorm2d and BatchNorm3d can"
            )
    for _, norm in norms:
        if type(norm) not in SYNCHRONIZED:
            norm.__class__ = SyncBatchNorm
    return model
