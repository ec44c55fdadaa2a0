"""Steps whose loss or gradient is not finite, and weights that are not: what is done about them, and what is said."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from repkern.train.recipe import RunRecipe

if TYPE_CHECKING:
    from repkern.train.trainer import Trainer

__all__ = ["TrainingDivergedError", "check_weights", "clip_gradients", "diverged", "not_finite"]


class TrainingDivergedError(RuntimeError):
    """The loss, or the weights, are not finite any more."""


def diverged(trainer: Trainer, what: str) -> TrainingDivergedError:
    """The error that says where it was noticed and from where one could go on."""
    saved, rate = trainer.saved, trainer.optimizers["weights"].param_groups[0]["lr"]
    return TrainingDivergedError(
        f"{what}, in step {trainer.step + 1} (epoch {trainer.epoch + 1}); "
        f"{f'the last good checkpoint is {saved}' if saved else 'there is no checkpoint'}; "
        f"lower the learning rate ({rate:g}) or clip the gradient (train.clip_norm)"
    )


def check_weights(trainer: Trainer) -> None:
    """TrainingDivergedError for weights that are not finite, in any process; every one of them calls it.

    A finite loss can have a gradient that is not. Its norm is known only where it is clipped; otherwise what it leaves
    behind is found here, before a checkpoint and after the next loss that is not finite.
    """
    bad = not_finite(trainer.model)
    if trainer.runtime.agree([bool(bad)])[0]:
        raise diverged(trainer, f"{bad or 'a weight of another process'} is not finite")


@torch.no_grad()
def not_finite(model: nn.Module) -> str:
    """The name of the first parameter or statistic of a norm with NaN or infinity in it, "" when there is none.

    Other buffers are the network's own affair: a mask may hold -inf.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        if isinstance(module, _NormBase):
            tensors |= {f"{path}.{name}".lstrip("."): buffer for name, buffer in module.named_buffers(recurse=False)}
    local = {name: getattr(t, "to_local", lambda t=t: t)() for name, t in tensors.items()}  # of what is sharded
    local = {name: tensor for name, tensor in local.items() if tensor.numel()}
    if not local:
        return ""
    # NaN passes through aminmax, which reads a tensor once and makes no other of its size.
    finite = torch.stack([torch.isfinite(torch.stack(tensor.aminmax())).all() for tensor in local.values()]).tolist()
    return next((name for name, good in zip(local, finite, strict=True) if not good), "")


def clip_gradients(optimizer: torch.optim.Optimizer, recipe: RunRecipe) -> bool:
    """Clip what `optimizer` trains, as `recipe` says. Returns whether the norm, where it is needed, is finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if recipe.clip_value:
        nn.utils.clip_grad_value_(parameters, recipe.clip_value)
    if not recipe.clip_norm:
        return True
    total = nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
    return math.isfinite(getattr(total, "full_tensor", lambda: total)().item())
