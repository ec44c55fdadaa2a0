"""ncnn as a rival: plain convolutional networks written in its formats, and run by its Python module."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

__all__ = ["NcnnNet", "convolution_net", "write_ncnn"]

_MAGIC = "7767517"
_FLOAT32 = b"\0\0\0\0"  # before the weights of a layer: stored as they are
_WIDEST = 16  # channels side by side that ncnn uses with AVX-512
_HALF_OPTIONS = (
    "use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage",
    "use_int8_inference", "use_int8_packed", "use_int8_storage", "use_int8_arithmetic",
)  # fmt: skip


@dataclass
class _Layer:
    """One layer: its blobs are fx nodes, those of aliases resolved."""

    kind: str
    sources: list[fx.Node]
    result: fx.Node
    values: str = ""
    weights: bytes = b""


def write_ncnn(model: nn.Module, example: Tensor) -> tuple[str, bytes]:
    """The .param and .bin of a plain network in eval mode: blob "in0" to blob "out0", for one image at a time.

    example: an input [1, C, H, W]. Written are convolutions with the ReLU behind them, ReLU, max pooling, global
    average pooling, flatten, linear layers and additions of two maps. ValueError names anything else.
    """
    return _Writer(model, example).write()


class _Writer:
    def __init__(self, model: nn.Module, example: Tensor) -> None:
        traced = fx.symbolic_trace(model)
        with torch.no_grad():
            ShapeProp(traced).propagate(example)
        self.modules = dict(traced.named_modules())
        self.alias: dict[fx.Node, fx.Node] = {}
        self.layers: list[_Layer] = []
        for node in traced.graph.nodes:
            self._add(node)

    def write(self) -> tuple[str, bytes]:
        readers = Counter(source for layer in self.layers for source in layer.sources)
        names: dict[fx.Node, list[str]] = {}
        lines: list[str] = []
        blobs = 0
        for number, layer in enumerate(self.layers):
            inputs = [names[source].pop() for source in layer.sources]
            name = {"Input": "in0", "Noop": "out0"}.get(layer.kind, f"b{number}")
            lines.append(_line(layer.kind, f"l{number}", inputs, [name], layer.values))
            names[layer.result] = [name]
            blobs += 1
            count = readers[layer.result]
            if count > 1:  # a blob has one reader
                names[layer.result] = [f"{name}_{at}" for at in range(count)]
                lines.append(_line("Split", f"s{number}", [name], names[layer.result]))
                blobs += count
        text = "\n".join([_MAGIC, f"{len(lines)} {blobs}", *lines]) + "\n"
        return text, b"".join(layer.weights for layer in self.layers)

    def _add(self, node: fx.Node) -> None:
        if node in self.alias:
            return
        sources = [self.alias.get(source, source) for source in node.all_input_nodes]
        if node.op == "placeholder":
            self.layers.append(_Layer("Input", [], node))
        elif node.op == "output":
            self.layers.append(_Layer("Noop", sources, node))
        elif node.op == "call_module":
            self._module(node, sources, self.modules[str(node.target)])
        else:
            self._function(node, sources)

    def _module(self, node: fx.Node, sources: list[fx.Node], module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            self._convolution(node, sources, module)
        elif isinstance(module, nn.ReLU):
            self.layers.append(_Layer("ReLU", sources, node))
        elif isinstance(module, nn.Linear):
            values = f"0={module.out_features} 1={int(module.bias is not None)} 2={module.weight.numel()}"
            self.layers.append(_Layer("InnerProduct", sources, node, values, _weights(module)))
        elif isinstance(module, nn.MaxPool2d) and not module.ceil_mode and _pair(module.dilation) == (1, 1):
            kernel, stride, padding = (_pair(v) for v in (module.kernel_size, module.stride, module.padding))
            values = f"0=0 {_sizes(1, kernel)} {_sizes(2, stride)} {_sizes(3, padding)} 5=1"
            self.layers.append(_Layer("Pooling", sources, node, values))
        elif isinstance(module, nn.AdaptiveAvgPool2d) and _pair(module.output_size) == (1, 1):
            self.layers.append(_Layer("Pooling", sources, node, "0=1 4=1"))
        elif isinstance(module, nn.Identity | nn.Dropout | nn.Flatten):
            self.alias[node] = sources[0]
        else:
            raise ValueError(f"write_ncnn: {node.target} is {type(module).__name__}, which is not written")

    def _function(self, node: fx.Node, sources: list[fx.Node]) -> None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if name in ("add", "iadd", "add_") and len(sources) == 2:
            self.layers.append(_Layer("BinaryOp", sources, node, "0=0"))
        elif name in ("relu", "relu_"):
            self.layers.append(_Layer("ReLU", sources, node))
        elif name == "adaptive_avg_pool2d" and tuple(node.meta["tensor_meta"].shape[2:]) == (1, 1):
            self.layers.append(_Layer("Pooling", sources, node, "0=1 4=1"))
        elif name == "flatten" and sources[0].meta["tensor_meta"].shape[2:].numel() == 1:
            self.alias[node] = sources[0]
        else:
            raise ValueError(f"write_ncnn: {name} is not written")

    def _convolution(self, node: fx.Node, sources: list[fx.Node], conv: nn.Conv2d) -> None:
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"write_ncnn: {node.target} pads with {conv.padding_mode} by {conv.padding!r}")
        kernel, stride, dilation = _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.dilation)
        values = f"0={conv.out_channels} {_sizes(1, kernel)} {_sizes(2, dilation)} {_sizes(3, stride)}"
        values += f" {_sizes(4, _pair(conv.padding))} 5={int(conv.bias is not None)} 6={conv.weight.numel()}"
        values += f" 7={conv.groups}" if conv.groups > 1 else ""
        users = list(node.users)
        if len(users) == 1 and isinstance(self.modules.get(str(users[0].target)), nn.ReLU):
            self.alias[users[0]] = node
            values += " 9=1"
        kind = "Convolution" if conv.groups == 1 else "ConvolutionDepthWise"
        self.layers.append(_Layer(kind, sources, node, values, _weights(conv)))


def _line(kind: str, name: str, inputs: list[str], outputs: list[str], values: str = "") -> str:
    return " ".join([kind, name, str(len(inputs)), str(len(outputs)), *inputs, *outputs, values]).rstrip()


def _pair(value: object) -> tuple[int, int]:
    one, other = value if isinstance(value, tuple | list) else (value, value)
    return int(one), int(other)  # type: ignore[call-overload]


def _sizes(key: int, height_width: tuple[int, int]) -> str:
    """ncnn numbers the width `key` and the height 10 more."""
    return f"{key}={height_width[1]} {key + 10}={height_width[0]}"


def _weights(module: nn.Conv2d | nn.Linear) -> bytes:
    weight = _FLOAT32 + module.weight.detach().float().contiguous().numpy().tobytes()
    return weight if module.bias is None else weight + module.bias.detach().float().contiguous().numpy().tobytes()


def convolution_net(weight: Tensor) -> tuple[str, bytes]:
    """The .param and .bin of one 3x3 convolution, stride 1, padding 1; weight [K, C, 3, 3]."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False, device="meta")
    conv.weight = nn.Parameter(weight, requires_grad=False)
    return write_ncnn(nn.Sequential(conv), torch.zeros(1, weight.shape[1], 4, 4))


class NcnnNet:
    """A network of `write_ncnn` in float32: Winograd, GEMM and packed channels on, nothing in half precision.

    ImportError without ncnn. RuntimeError when ncnn cannot read the network.
    """

    def __init__(self, param: str, weights: bytes, threads: int) -> None:
        import ncnn

        self._ncnn = ncnn
        self._net = ncnn.Net()
        option = self._net.opt
        option.num_threads = threads
        option.use_vulkan_compute = False
        option.use_winograd_convolution = option.use_sgemm_convolution = option.use_packing_layout = True
        for name in _HALF_OPTIONS:
            setattr(option, name, False)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "net.param").write_text(param)
            (Path(folder) / "net.bin").write_bytes(weights)
            read = self._net.load_param(str(Path(folder) / "net.param"))
            read = read or self._net.load_model(str(Path(folder) / "net.bin"))
        if read:
            raise RuntimeError(f"ncnn cannot read the network (code {read})")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """images [N, C, H, W] float32 -> what the network answers, [N, ...]; ncnn takes one image after the other."""
        return np.stack([np.array(self._run(self._ncnn.Mat(image).clone(), 0)) for image in images])

    def runner(self, images: np.ndarray, *, packed: bool) -> Callable[[], Any]:
        """A call that runs all images and drops the results.

        packed: the maps go in and come out with their channels side by side, as between the layers of a network.
        """
        mats = [self._ncnn.Mat(image).clone() for image in images]
        if packed:
            mats = [self._packed(mat) for mat in mats]
        kept = int(packed)  # of `extract`: 1 leaves the result packed

        def run() -> None:
            for mat in mats:
                self._run(mat, kept)

        return run

    def _run(self, mat: Any, kept: int) -> Any:
        extractor = self._net.create_extractor()
        extractor.input("in0", mat)
        failed, result = extractor.extract("out0", kept)
        if failed:
            raise RuntimeError(f"ncnn failed with code {failed}")
        return result

    def _packed(self, mat: Any) -> Any:
        for count in (_WIDEST, 8, 4):
            if mat.c % count == 0:
                result = self._ncnn.Mat()
                self._ncnn.convert_packing(mat, result, count, self._net.opt)
                return result
        return mat
