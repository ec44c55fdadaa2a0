"""Every way of repkern and torch to run a 3x3 convolution with prepared weights, under one signature."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repkern import ops
from repkern.bench.rivals_ncnn import NcnnNet, convolution_net

__all__ = ["DTYPES", "FORMATS", "Method", "NcnnConv", "allowed_error", "our_methods", "precision", "torch_methods"]

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
#: Precision of a run -> dtype of the maps; "fp32" allows no TF32.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative L2 error against float64 that is still right, by precision and tile; tile 1 is direct convolution.
_ALLOWED = {
    "fp32": {1: 1e-6, 2: 1e-6, 4: 3e-6, 6: 1e-5},
    "tf32": {1: 8e-4, 2: 8e-4, 4: 2.5e-3, 6: 6e-3},
    "fp16": {1: 8e-4, 2: 8e-4, 4: 2.5e-3, 6: 6e-3},
    "bf16": dict.fromkeys((1, 2, 4, 6), 6e-3),
}


@dataclass(frozen=True)
class Method:
    """run(x, pack(weight)) -> the convolution with padding 1; tile 1 for direct ones, `formats` those of x it takes."""

    name: str
    tile: int
    pack: Callable[[Tensor], Tensor]
    run: Callable[[Tensor, Tensor], Tensor]
    formats: Sequence[str] = tuple(FORMATS)


def allowed_error(how: str, tile: int) -> float:
    """The relative L2 error against float64 up to which a result of precision `how` counts as right."""
    return _ALLOWED[how][tile]


def our_methods(out_channels: int, how: str, device: str, tiles: Sequence[int]) -> list[Method]:
    """Winograd with either form of packed weights for each tile, and direct convolution on a CPU in float32."""
    methods = []
    for tile in tiles:
        winograd = functools.partial(_winograd, out_channels=out_channels, tile=tile)
        transform = functools.partial(ops.winograd_transform_weight, tile=tile)
        methods.append(Method(f"F{tile}", tile, transform, winograd))
        if hasattr(ops, "winograd_pack_weight"):
            methods.append(Method(f"F{tile} blocks", tile, ops.winograd_pack_weight, winograd))
    if device == "cpu" and how == "fp32" and hasattr(ops, "direct_pack_weight"):
        for name in ("fma", "split"):
            pack = functools.partial(ops.direct_pack_weight, method=name)
            methods.append(Method(f"direct {name}", 1, pack, functools.partial(_direct, out_channels=out_channels)))
    return methods


def torch_methods() -> list[Method]:
    """torch.conv2d, the weights in the memory format of the maps."""
    return [
        Method(
            "torch", 1, functools.partial(_in_format, memory_format=memory_format), _conv2d, formats=(name,)
        )
        for name, memory_format in FORMATS.items()
    ]  # fmt: skip


@contextlib.contextmanager
def precision(how: str) -> Iterator[None]:
    """TF32 allowed or not, and cuDNN's fastest algorithm searched for, inside."""
    names = ((torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32"))
    settings = [(owner, name, how == "tf32") for owner, name in names]
    settings.append((torch.backends.cudnn, "benchmark", True))
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


def _winograd(x: Tensor, packed: Tensor, *, out_channels: int, tile: int) -> Tensor:
    return ops.winograd_conv2d_packed(x, packed, out_channels=out_channels, tile=tile)


def _direct(x: Tensor, packed: Tensor, *, out_channels: int) -> Tensor:
    return ops.direct_conv2d_packed(x, packed, out_channels=out_channels, kernel_size=3, padding=1)  # type: ignore[attr-defined]


def _conv2d(x: Tensor, weight: Tensor) -> Tensor:
    return torch.conv2d(x, weight, padding=1)


def _in_format(weight: Tensor, memory_format: torch.memory_format) -> Tensor:
    return weight.to(memory_format=memory_format)


class NcnnConv:
    """For `Remote`: ncnn's Winograd convolution, maps packed as between the layers of one of its networks."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._threads = threads
        self.run: Callable[[], None] = lambda: None

    def prepare(self, weight: np.ndarray, x: np.ndarray, copies: int) -> np.ndarray:
        """Networks with `copies` copies of the weights, run in turn; returns the convolution of x [N, C, H, W]."""
        written = convolution_net(torch.from_numpy(weight))
        nets = [NcnnNet(*written, self._threads) for _ in range(copies)]
        runners = [net.runner(x, packed=True) for net in nets]
        answer = nets[0](x)
        turn = 0

        def run() -> None:
            nonlocal turn
            runners[turn]()
            turn = (turn + 1) % copies

        self.run = run
        return answer
