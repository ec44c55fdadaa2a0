"""What a network costs before it is trained: parameters and multiply-adds of each layer, and memory of a step.

Everything runs on the meta device, so that no weights are touched and large networks need no time and no memory.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from repkern.nn.block import RepBlock

__all__ = ["LayerProfile", "MemoryEstimate", "estimate_memory", "profile_layers"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerProfile:
    """A block, or a module that contains no other. output: shape for one image, without the batch dimension.

    multiply_adds: of the training form's forward pass, for one image; what makes OREPA's kernels, once a step however
    many images there are, is not counted.
    """

    name: str
    kind: str
    parameters: int
    multiply_adds: int
    output: Shape


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training. weights: with buffers. kept: what the forward pass leaves for the backward pass.

    step: the most that a training step adds to what stays between steps: activations, gradients and temporary tensors.
    """

    weights: int
    optimizer: int
    ema: int
    kept: int
    step: int

    @property
    def total(self) -> int:
        """The peak of the training."""
        return self.weights + self.optimizer + self.ema + self.step

    def as_json(self) -> dict[str, int]:
        """The figures by name."""
        return {**asdict(self), "total": self.total}


def profile_layers(model: nn.Module, image_shape: Sequence[int]) -> list[LayerProfile]:
    """The layers of `model` in training form, in the order in which they are registered.

    image_shape: [C, H, W] of an image. ValueError for an image that the network cannot take.
    """
    model = _on_meta(model).train()
    rows = dict(_rows(model))
    outputs: dict[str, Shape] = {}
    handles = [module.register_forward_hook(_shape_into(outputs, name)) for name, module in rows.items()]
    with FlopCounterMode(display=False) as counter:
        _forward(model, image_shape)
    for handle in handles:
        handle.remove()
    counts = counter.get_flop_counts()
    root = type(model).__name__
    return [
        LayerProfile(
            name,
            type(module).__name__,
            sum(parameter.numel() for parameter in module.parameters()),
            sum(counts.get(f"{root}.{name}", {}).values()) // 4,  # two images, and two operations each
            outputs.get(name, ()),
        )
        for name, module in rows.items()
    ]


def _forward(model: nn.Module, image_shape: Sequence[int], images: int = 2) -> Any:
    if len(image_shape) != 3 or any(type(size) is not int or size < 1 for size in image_shape):
        raise ValueError(f"image_shape must be three sizes of at least 1: [C, H, W], got {list(image_shape)}")
    try:
        with torch.no_grad():
            return model(torch.empty(images, *image_shape, device="meta", dtype=_dtype(model)))
    except (RuntimeError, ValueError, TypeError) as problem:
        shown = "x".join(map(str, image_shape))
        raise ValueError(f"the network does not take images of {shown}: {problem}") from None


def _rows(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    rows = []
    for name, child in model.named_children():
        path = prefix + name
        if isinstance(child, RepBlock) or next(child.children(), None) is None:
            rows.append((path, child))
        else:
            rows += _rows(child, f"{path}.")
    return rows


def _shape_into(outputs: dict[str, Shape], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[name] = tuple(output.shape[1:])

    return hook


def estimate_memory(
    model: nn.Module,
    image_shape: Sequence[int],
    batch_size: int,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    accumulate: int = 1,
    ema: bool = False,
) -> MemoryEstimate:
    """What training `model` on one device will take, as torch's allocator counts it.

    batch_size: images of a step on this device, computed in `accumulate` pieces. optimizer: makes one for a network.
    ema: whether a second copy of weights and buffers is kept.
    The step is run on the meta device in float32 or whatever the weights are, with every tensor's life followed; what
    libraries (oneDNN, cuDNN) take as scratch is not in it, and autocast needs less. Within 10 % of `training_memory`.
    ValueError for sizes that cannot be.
    """
    if accumulate < 1 or batch_size < 1 or batch_size % accumulate:
        raise ValueError(f"batch_size must be a multiple of accumulate, got {batch_size} and {accumulate}")
    model = _on_meta(model).train()
    made = optimizer(model)
    _forward(model, image_shape)
    images = torch.empty(batch_size // accumulate, *image_shape, device="meta", dtype=_dtype(model))
    target = torch.empty(len(images), dtype=torch.long, device="meta")
    kept: list[int] = []

    def step(live: _Live | None = None) -> None:
        for _ in range(accumulate):
            scores = model(images)
            scores = scores if isinstance(scores, Tensor) else tree_leaves(scores)[0]
            if live is not None:
                kept.append(live.now)
            functional.cross_entropy(scores, target).backward()
        made.step()
        made.zero_grad()

    step()  # creates the optimizer's state
    weights = _bytes([*model.parameters(), *model.buffers()])
    state = _bytes([leaf for state in made.state.values() for leaf in state.values() if isinstance(leaf, Tensor)])
    with _Live() as live:
        step(live)
    return MemoryEstimate(weights, state, weights if ema else 0, kept[0], live.peak)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _bytes(tensors: Sequence[Tensor]) -> int:
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without values, made without copying any first."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still referred to. peak: the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = [leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {id(storage) for storage in storages}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._made(leaf.untyped_storage(), given)
        return result

    def _made(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        # torch keeps one Python object for a storage as long as it lives, so its id and its end are the storage's.
        key = id(storage)
        if key in self._sizes or key in given:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._ended, key)

    def _ended(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
