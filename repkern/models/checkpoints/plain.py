"""Weights of plain convolutions for a model whose convolutions became blocks: each block starts as its convolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from repkern.models.checkpoints.layout import Conversion
from repkern.nn.block import RepBlock

__all__ = ["PlainStart", "advice", "plain_names", "start_blocks", "take_plain"]


class PlainStart(NamedTuple):
    """A block of the model, and the convolution of the checkpoint that it should start as."""

    name: str
    block: RepBlock
    weight: Tensor
    bias: Tensor | None

    @property
    def names(self) -> list[str]:
        """The checkpoint's names of the two."""
        return [f"{self.name}.{part}" for part in ("weight", "bias")[: 1 + (self.bias is not None)]]


def plain_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The kernels and biases of those blocks of `model` of which the checkpoint has nothing else."""
    found: dict[str, Tensor] = {}
    for name, _ in _blocks(model):
        own = {
            f"{name}.{part}": tensors[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in tensors
        }
        if f"{name}.weight" in own and not any(o.startswith(f"{name}.") and o not in own for o in tensors):
            found |= own
    return found


def take_plain(converted: Conversion, model: nn.Module) -> list[PlainStart]:
    """Take the plain convolutions of blocks of `model` out of `converted`.

    Left there is what may be a deployed form, where a file of the training form is what is wanted: what a released
    deployed block was converted to, and, for a block with norms inside, kernel and bias from a file without any norm.
    """
    tensors, plain = converted.tensors, plain_names(converted.tensors, model)
    wanted = model.state_dict()
    deployed = {name for block in converted.blocks if block.deployed for name in block.names}
    has_norms = any(name.endswith("running_mean") for name in tensors)
    taken: list[PlainStart] = []
    for name, block in _blocks(model):
        weight, bias = plain.get(f"{name}.weight"), plain.get(f"{name}.bias")
        if weight is None or f"{name}.weight" in wanted or f"{name}.weight" in deployed:
            continue
        if block.has_norm and bias is not None and not has_norms:
            continue
        if tuple(weight.shape) == _shape(block) and weight.is_floating_point():
            taken.append(PlainStart(name, block, weight, bias))
    for start in taken:
        for name in start.names:
            del tensors[name]
    return taken


@torch.no_grad()
def start_blocks(starts: list[PlainStart]) -> None:
    """`set_equivalent_kernel_bias` of each. ValueError, naming the block, with all of them as before."""
    before: list[tuple[RepBlock, dict[str, Tensor]]] = []
    try:
        for start in starts:
            if start.weight.is_meta or next(start.block.parameters()).is_meta:
                continue
            like = next(start.block.parameters())
            before.append((start.block, {name: t.clone() for name, t in start.block.state_dict().items()}))
            bias = None if start.bias is None else start.bias.to(like)
            start.block.set_equivalent_kernel_bias(start.weight.to(like), bias)
    except (ValueError, NotImplementedError) as problem:
        for block, state in before:
            block.load_state_dict(state)
        raise ValueError(f"{start.name}: {problem}") from problem


def advice(unexpected: list[str], model: nn.Module) -> list[str]:
    """What to do where names that the model does not have are those of a plain network."""
    modules = dict(model.named_modules())
    plain = [name for name in unexpected if _belongs_to_plain(name, modules)]
    if not plain:
        return []
    return [
        f"{len(plain)} tensors (first {plain[0]}) are of a plain network, whose convolutions or norms became blocks "
        "here: load them into the plain model first, then repkern.replace_convs(model, ..., preserve=True)"
    ]


def _belongs_to_plain(name: str, modules: Mapping[str, nn.Module]) -> bool:
    owner, _, part = name.rpartition(".")
    module = modules.get(owner)
    if isinstance(module, RepBlock):
        return part == "weight"
    return isinstance(module, nn.Identity) and part == "running_mean"


def _blocks(model: nn.Module) -> Iterator[tuple[str, RepBlock]]:
    """The outermost blocks, apart from the model itself."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if name and isinstance(module, RepBlock) and not any(name.startswith(outer) for outer in inside):
            inside.append(f"{name}.")
            yield name, module


def _shape(block: RepBlock) -> tuple[int, ...]:
    return (block.out_channels, block.in_channels // block.groups, *block.kernel_size)
