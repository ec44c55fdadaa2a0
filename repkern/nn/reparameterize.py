"""reparameterize: every block of a model -> the plain convolution it computes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repkern.nn._surgery import replace_modules
from repkern.nn.block import RepBlock
from repkern.nn.group import ungroup_squeeze
from repkern.nn.verify import Example, Reference, check_same_function

__all__ = ["is_block", "reparameterize"]


def is_block(module: nn.Module) -> bool:
    """Whether `reparameterize` converts this module: a `RepBlock`, or another class of ours with a `fuse()`.

    Foreign modules may have a `fuse` that means something else.
    """
    ours = (kind for kind in type(module).__mro__ if "fuse" in vars(kind))
    return isinstance(module, RepBlock) or any(kind.__module__.partition(".")[0] == "repkern" for kind in ours)


def reparameterize(model: nn.Module, *, inplace: bool = False, verify: Example | None = None) -> nn.Module:
    """Replace every block by its plain module (the root included) and return the model.

    Without `inplace` the model given stays as it is and a copy is returned. A block that sits in several places is
    converted once and its plain module sits in all of them; hooks, training flag, dtype, device and requires_grad are
    kept. Idempotent: a model without blocks comes back unchanged.

    verify: example input, a tensor or a tuple of arguments. The model is run before and after, in eval mode without
    gradients, and ValueError is raised, with the largest difference, the bound and the first block that differs, when
    the two disagree by more than rounding; also, by name, for parameters or statistics that are NaN or infinite.

    UserWarning in train mode (the plain model uses running statistics, so outputs differ from those of training), and
    for BatchNorms inside blocks whose statistics are untouched or not finite. ValueError for those that keep none.
    """
    _warn_about(model)
    if not inplace:
        model = copy.deepcopy(model)
    reference = None if verify is None else Reference(model, verify)
    ungroup_squeeze(model)
    plain_of: dict[nn.Module, RepBlock] = {}

    def pick(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, RepBlock):
            return None
        try:
            plain = module.fuse()
        except ValueError as problem:
            raise ValueError(f"reparameterize: block {name or '(root)'}: {problem}") from problem
        plain_of[plain] = module
        return plain

    model = replace_modules(model, pick)
    if reference is not None:
        check_same_function(model, reference, plain_of)
    return model


def _norms_in_blocks(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    seen: set[int] = set()
    for prefix, block in model.named_modules():
        if isinstance(block, RepBlock):
            for name, norm in block.named_modules(prefix=prefix):
                if isinstance(norm, _BatchNorm) and id(norm) not in seen:
                    seen.add(id(norm))
                    yield name, norm


def _warn_about(model: nn.Module) -> None:
    blocks = [module for module in model.modules() if isinstance(module, RepBlock)]
    if not blocks:
        return
    if any(block.training for block in blocks):
        warnings.warn(
            "reparameterize: the model is in train mode. The plain model uses the running statistics of its "
            "BatchNorms, as the model does after model.eval(); compare the two in eval mode.",
            UserWarning,
            stacklevel=3,
        )
    untouched, broken = [], []
    for name, norm in _norms_in_blocks(model):
        if norm.running_mean is None or norm.running_var is None:
            continue
        if not (torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()):
            broken.append(name)
        elif norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0 and _is_fresh(norm):
            untouched.append(name)
    if untouched:
        warnings.warn(
            "reparameterize: these BatchNorms have never seen data (mean 0, variance 1), so what is folded is "
            f"not what training would give: {', '.join(untouched)}",
            UserWarning,
            stacklevel=3,
        )
    if broken:
        warnings.warn(
            f"reparameterize: these BatchNorms have NaN or infinite statistics: {', '.join(broken)}",
            UserWarning,
            stacklevel=3,
        )


def _is_fresh(norm: _BatchNorm) -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())
