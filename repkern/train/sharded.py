"""FSDP2: a network whose weights, gradients and optimizer state are spread over the processes.

Everything here does nothing to tensors and networks that are not spread, so that callers need not ask. A checkpoint
holds whole tensors: one that was saved with FSDP2 resumes with DDP, and the other way round.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from repkern.nn.block import RepBlock
from repkern.train.recipe import TrainingRecipe

__all__ = [
    "check_recipe",
    "is_sharded",
    "part_like",
    "require_whole",
    "shard",
    "sum_gradients",
    "whole",
    "whole_network",
    "whole_weights",
]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def check_recipe(recipe: TrainingRecipe, optimizers: Mapping[str, torch.optim.Optimizer] | None) -> None:
    """ValueError for what needs whole weights or gradients outside of the network's forward pass."""
    wanted = {
        f"optimizer.name {recipe.optimizer.name}, which multiplies gradients of whole kernels": (
            recipe.optimizer.name in ("repsgd", "repadamw")
        ),
        "loss.custom_l2, which reads the weights of all blocks at once": recipe.loss.custom_l2,
        "optimizers that were made before the network was spread; leave it to the recipe": bool(optimizers),
    }
    for what, is_wanted in wanted.items():
        if is_wanted:
            raise ValueError(f"strategy fsdp2 does not work with {what}; use strategy ddp")


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread the parameters of `model`, in place, by units that are gathered one after the other: blocks and the rest.

    All processes of the run take part. ValueError for a parameter that two units share.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    # A hook on the network itself may read parameters of any block (`group_squeeze` does).
    units = [] if model._forward_pre_hooks else _units(model)
    _check_apart(model, units)
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _units(model: nn.Module) -> list[nn.Module]:
    """Outermost blocks and outermost items of containers that are more than one layer."""
    found: dict[int, nn.Module] = {}

    def walk(module: nn.Module, item: bool) -> None:
        if isinstance(module, RepBlock) or (item and not isinstance(module, _CONTAINERS) and module._modules):
            if any(True for _ in module.parameters()):
                found[id(module)] = module
            return
        for child in module.children():
            walk(child, isinstance(module, _CONTAINERS))

    for child in model.children():
        walk(child, isinstance(model, _CONTAINERS))
    return list(found.values())


def _check_apart(model: nn.Module, units: list[nn.Module]) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    owner: dict[int, nn.Module] = {}
    for unit in units:
        for name, parameter in unit.named_parameters():
            other = owner.setdefault(id(parameter), unit)
            if other is not unit:
                raise ValueError(
                    f"strategy fsdp2: {names[id(unit)]}.{name} is a parameter of {names[id(other)]} too, and cannot be "
                    "spread; use strategy ddp"
                )


def _parts(model: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _is_part(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return any(_is_part(parameter) for parameter in model.parameters())


def require_whole(model: nn.Module) -> None:
    """ValueError for a network that is spread: its modules cannot be changed."""
    if is_sharded(model):
        raise ValueError("strategy fsdp2 needs a network of fixed structure; use strategy ddp to change modules")


def whole(value: Any, keep: bool = True) -> Any:
    """`value` (dicts, lists and tuples of anything) with whole tensors on the CPU in place of parts.

    Every process calls it with the same structure; with `keep` False parts are left out: None stands for them, so that
    one process alone has to hold everything.
    """
    if _is_part(value):
        full = value.full_tensor().detach()
        return full.cpu() if keep else None
    if isinstance(value, Mapping):
        return {name: whole(item, keep) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item, keep) for item in value)
    return value


def whole_network(model: nn.Module, plain: nn.Module) -> nn.Module:
    """`model` itself, or where it is spread a whole one on the CPU: a copy of `plain`, its outline on the meta device.

    Every process calls it. Buffers that are not in the state_dict are left without values.
    """
    if not is_sharded(model):
        return model
    tensors = whole(model.state_dict())
    network = copy.deepcopy(plain).to_empty(device="cpu")
    network.load_state_dict(tensors)
    return network.train(model.training)


def part_like(tensor: Any, pattern: Tensor) -> Any:
    """This process's part of a whole `tensor`, spread as `pattern` is; `tensor` where it has another shape."""
    if not _is_part(pattern) or not isinstance(tensor, Tensor) or tensor.shape != pattern.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    placed = tensor.to(pattern.device)
    # Every process has the whole tensor already: nothing is sent.
    return distribute_tensor(placed, pattern.device_mesh, pattern.placements, src_data_rank=None)


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` computes without the other processes, which may have other numbers of batches."""
    parts = list(_parts(model)) if is_sharded(model) else []
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def sum_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass exchanges gradients, or keeps them for a later one."""
    exchange: Any = getattr(model, "set_requires_gradient_sync", None)
    if exchange is not None:
        exchange(now)
