"""Every way of repkern and torch to run a 3x3 convolution with prepared weights, under one signature."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repkern import _native, ops
from repkern.bench.rivals_ncnn import NcnnNet, convolution_net
from repkern.deploy._methods import FORMS, METHODS, ConvSpec, Maps
from repkern.deploy._methods import Method as LayerMethod

__all__ = [
    "DTYPES",
    "FORMATS",
    "Method",
    "NcnnConv",
    "allowed_error",
    "layer_methods",
    "op_methods",
    "precision",
    "torch_methods",
]

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
#: Precision of a run -> dtype of the maps; "fp32" allows no TF32.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative L2 error against float64 that is still right, by precision and tile; tile 1 is direct convolution.
_ALLOWED = {
    "fp32": {1: 1e-6, 2: 1e-6, 4: 3e-6, 5: 3e-6, 6: 1e-5},
    "tf32": {1: 8e-4, 2: 8e-4, 4: 2.5e-3, 5: 6e-3, 6: 6e-3},
    "fp16": {1: 8e-4, 2: 8e-4, 4: 2.5e-3, 5: 6e-3, 6: 6e-3},
    "bf16": dict.fromkeys((1, 2, 4, 5, 6), 6e-3),
}


Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Method:
    """bind(x, pack(weight))() -> the convolution with padding 1. formats: those of x. tile: 1 for direct ones.

    whose: "ours", "torch" (the baseline) or "onednn" (torch's fused operators, which a network may choose as well).
    """

    name: str
    whose: str
    tile: int
    pack: Callable[[Tensor], Tensor]
    bind: Callable[[Tensor, Tensor], Call]
    formats: Sequence[str] = tuple(FORMATS)


def allowed_error(how: str, tile: int) -> float:
    """The relative L2 error against float64 up to which a result of precision `how` counts as right."""
    return _ALLOWED[how][tile]


def op_methods(out_channels: int, how: str, device: str, tiles: Sequence[int]) -> list[Method]:
    """The public ops: Winograd with each form of packed weights; in float32 on a CPU direct convolution too.

    Split weights only where there is the unit they are for.
    """
    methods = []
    for tile in tiles:
        run = functools.partial(ops.winograd_conv2d_packed, out_channels=out_channels, tile=tile)
        packs: dict[str, Callable[[Tensor], Tensor]] = {
            f"F{tile}": functools.partial(ops.winograd_transform_weight, tile=tile),
            f"F{tile} blocks": ops.winograd_pack_weight,
        }
        methods += [Method(name, "ours", tile, pack, _binder(run)) for name, pack in packs.items()]
    if device == "cpu" and how == "fp32":
        run = functools.partial(ops.direct_conv2d_packed, out_channels=out_channels, kernel_size=3, padding=1)
        on_tiles = _native.native_build_info().get("isa_used") == "amx"
        for name in ("fma", "split") if on_tiles else ("fma",):
            pack = functools.partial(ops.direct_pack_weight, method=name)
            methods.append(Method(f"direct {name}", "ours", 1, pack, _binder(run)))
    return methods


def layer_methods(x: Tensor, out_channels: int, how: str, tiles: Sequence[int]) -> list[Method]:
    """What a layer of `optimize_for_inference` can use for maps like x, called as it calls them; channels_last."""
    spec = ConvSpec(x.shape[1], out_channels, (3, 3), padding=(1, 1), precision=how)
    maps = Maps(x.dtype, x.device, channels_last=True)
    methods = []
    for name, method in METHODS.items():
        if name == "torch" or method.why_not(spec, maps) is not None or (method.tile and method.tile not in tiles):
            continue
        whose = "onednn" if name.startswith("onednn") else "ours"
        pack, bind = _layer(method, spec)
        name = f"layer {name.removeprefix('winograd ')}"
        methods.append(Method(name, whose, method.tile or 1, pack, bind, ("channels_last",)))
    return methods


def torch_methods() -> list[Method]:
    """torch.conv2d, the weights in the memory format of the maps."""
    run = functools.partial(torch.conv2d, padding=1)
    return [
        Method("torch", "torch", 1, functools.partial(Tensor.to, memory_format=form), _binder(run), (name,))
        for name, form in FORMATS.items()
    ]


def _binder(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Call]:
    return lambda x, packed: functools.partial(run, x, packed)


def _layer(method: LayerMethod, spec: ConvSpec) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Call]]:
    def bind(x: Tensor, packed: Tensor) -> Call:
        return functools.partial(method.prepare(spec, packed, None, x, None), x, None)

    return lambda weight: FORMS[method.form].pack(weight, spec), bind


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
