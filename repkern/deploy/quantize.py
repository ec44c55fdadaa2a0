"""quantize: a trained network in INT8, after training or trained on, through torchao's PT2E flow for x86 CPUs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repkern.deploy.export import _anonymous, _batches, _trace
from repkern.deploy.quantize_torchao import LEAST_SCALE, Scheme, quiet, torchao_module, x86_quantizer
from repkern.models.files import parse_json, replaced
from repkern.models.zip_sums import check_archive, seal_archive
from repkern.nn import ConvNormAct, reparameterize
from repkern.nn._surgery import copied_model, replace_modules
from repkern.nn.reparameterize import is_block

__all__ = [
    "QATModule",
    "Quantized",
    "evaluate",
    "finish_ptq",
    "finish_qat",
    "images_of",
    "load_quantized",
    "observe",
    "prepare_qat",
    "quantize",
]

_METADATA = "repkern.json"
_FORMAT = "repkern.quantized"


@dataclass
class Quantized:
    """A quantized network: called with images [N, ...] it gives what the float network gave, any N.

    program: torch.export's, with int8 weights and quantize-dequantize pairs around float operators, which torch runs
    as they are anywhere, slowly; `compiled` makes them oneDNN's INT8 kernels.
    info: how it was made, as JSON values ("method", "weights", "weight_bits", "calibration_images").
    """

    program: ExportedProgram
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._module = self.program.module()

    @property
    def module(self) -> nn.Module:
        """What computes it, ready for torch.compile."""
        return self._module

    def __call__(self, images: Tensor) -> Any:
        """The outputs, without gradients."""
        with torch.no_grad():
            return self._module(images)

    def compiled(self) -> Callable[[Tensor], Any]:
        """The network on INT8 kernels: torch.compile with frozen weights, which needs a C++ compiler and an x86 CPU.

        Called as this is; every new shape of images is compiled on its first call, which takes seconds.
        """
        import torch._inductor.config as inductor

        fast = torch.compile(self._module, dynamic=False)
        known: set[torch.Size] = set()

        def run(images: Tensor) -> Any:
            with torch.no_grad():
                if images.shape in known:
                    return fast(images)
                with quiet(), inductor.patch(freezing=True):
                    outputs = fast(images)
            known.add(images.shape)
            return outputs

        return run

    def save(self, path: str | Path) -> None:
        """Write a .pt2 file that `load_quantized` reads; it appears whole or not at all, and has a SHA-256 sum.

        ValueError for another suffix. torch.export.load reads it too, once torchao was imported.
        """
        path = Path(path)
        _check_suffix(path)
        text = json.dumps({"format": _FORMAT, **self.info})
        with replaced(path) as temporary, quiet():
            torch.export.save(self.program, temporary, extra_files={_METADATA: text})
            seal_archive(temporary)


def load_quantized(path: str | Path) -> Quantized:
    """The network that `Quantized.save` wrote. FileNotFoundError; ValueError for other files; ImportError: torchao."""
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no quantized network at {path}")
    torchao_module("quantize_pt2e")  # its operators are in the program
    beside = {_METADATA: ""}
    try:
        check_archive(path)
        with quiet():
            program = torch.export.load(path, extra_files=beside)
        info = parse_json(beside[_METADATA] or "{}")
        if not isinstance(info, dict):
            raise ValueError(f"its metadata must be a JSON object, got {type(info).__name__}")
    except Exception as problem:  # torch.export.load has no common type for what can be wrong with a file
        raise ValueError(f"{path} is damaged or not a torch.export file: {problem}") from problem
    if info.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} was not written by repkern's quantization; torch.export.load reads such files")
    return Quantized(program, info)


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    weights: str = "per_channel",
    weight_bits: int = 8,
    progress: Callable[[int], None] = lambda images: None,
) -> Quantized:
    """Post-training quantization: INT8 weights and activations, from the ranges seen on `calibration`.

    model: any that torch.export traces, in training or deployed form; it is reparameterized (a copy, in eval mode, on
    the CPU) and stays as it is. BatchNorms behind convolutions are folded. What is quantized is what torchao's x86
    quantizer covers: convolutions, linear layers, and the pooling and additions between them.
    calibration: batches of float32 images [N, ...], or tuples that begin with them; all are run. A hundred to a few
    hundred training images are enough. progress: called with the number of images seen so far.
    weights, weight_bits: see `Scheme`. Few bits and "per_tensor" are for comparisons: torch.compile has INT8 kernels
    for the default only.

    ValueError for no or non-finite images, a model that cannot be traced, and as `reparameterize`; TypeError for
    batches that are something else; ImportError without torchao.
    """
    scheme = Scheme(weights, weight_bits)
    return finish_ptq(*observe(model, calibration, scheme, progress), scheme)


def finish_ptq(observed: torch.fx.GraphModule, seen: int, scheme: Scheme) -> Quantized:
    """The INT8 network of a graph that `observe` made, which is used up."""
    return _converted(observed, {"method": "ptq", **vars(scheme), "calibration_images": seen})


def observe(
    model: nn.Module,
    calibration: Iterable[Any],
    scheme: Scheme,
    progress: Callable[[int], None] = lambda images: None,
) -> tuple[torch.fx.GraphModule, int]:
    """The plain form of `model` as a graph with calibrated observers, and how many images these have seen."""
    flow = torchao_module("quantize_pt2e")
    prepared: torch.fx.GraphModule | None = None
    seen = 0
    for images in images_of(calibration):
        if prepared is None:
            graph, _ = _graph(reparameterize(_on_cpu(model).eval()), images)
            with quiet():
                prepared = flow.prepare_pt2e(graph, x86_quantizer(scheme, qat=False))
        assert prepared is not None
        with torch.no_grad():
            prepared(images)
        seen += len(images)
        progress(seen)
    if prepared is None:
        raise ValueError("calibration needs at least one batch of images, got none")
    prepared.meta["example"] = images
    return prepared, seen


class QATModule(nn.Module):
    """A network in quantization-aware training, as `prepare_qat` makes it.

    In training mode ranges follow what passes through; in eval mode they, and the BatchNorms' statistics, stand still.
    """

    def __init__(self, graph: torch.fx.GraphModule, example: Tensor, scheme: Scheme) -> None:
        super().__init__()
        self.graph = graph
        self.example = example
        self.scheme = scheme
        self.register_state_dict_post_hook(_leave_out_least_scales)
        self.register_load_state_dict_post_hook(_restore_least_scales)
        self.train()

    def forward(self, images: Tensor) -> Any:
        """What the float network gives, with the rounding of INT8."""
        return self.graph(images)

    def train(self, mode: bool = True) -> QATModule:
        """Switch BatchNorms, dropouts and observers. An exported graph has its mode in the calls, not in modules."""
        at = {torch.ops.aten.batch_norm.default: 5, torch.ops.aten.dropout.default: 2}
        for node in self.graph.graph.nodes:
            if node.op == "call_function" and node.target in at:
                node.update_arg(at[node.target], mode)
        self.graph.recompile()
        fake = torchao_module("fake_quantize")
        self.graph.apply(fake.enable_observer if mode else fake.disable_observer)
        self.training = mode
        return self


# An observer that is loaded from a file without torch's own metadata (safetensors) silently takes another least scale
# than it was made with. Here it never changes, so no file needs it.
_LEAST = ".activation_post_process.eps"


def _leave_out_least_scales(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and name.endswith(_LEAST)]:
        del state[name]


def _restore_least_scales(module: nn.Module, keys: Any) -> None:
    for name, buffer in module.named_buffers():
        if name.endswith(_LEAST):
            buffer.fill_(LEAST_SCALE)
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith(_LEAST)]


def prepare_qat(model: nn.Module, example: Tensor, *, weights: str = "per_channel", weight_bits: int = 8) -> QATModule:
    """A copy of `model` for quantization-aware training: its weights and maps are rounded as INT8 will round them.

    Train it as any module (a tenth of the epochs and of the learning rate are enough), then call `finish_qat`.
    Networks that a RepOptimizer trained, and any with a BatchNorm behind each convolution, keep those BatchNorms in
    training; multi-branch blocks are reparameterized first and have none left.
    example: float32 images [N, ...]. weights, weight_bits, errors: as `quantize`.
    """
    scheme = Scheme(weights, weight_bits)
    flow = torchao_module("quantize_pt2e")
    (images,) = images_of([example])
    graph, batch = _graph(_branches_folded(_on_cpu(model)).train(), images)
    with quiet():
        prepared = flow.prepare_qat_pt2e(graph, x86_quantizer(scheme, qat=True))
    return QATModule(prepared, batch, scheme)


def finish_qat(trained: QATModule, *, train_images: int = 0) -> Quantized:
    """The INT8 network that `trained` has been rehearsing; `trained` stays as it is.

    train_images: for `info`. TypeError for what `prepare_qat` did not make.
    """
    if not isinstance(trained, QATModule):
        raise TypeError(f"finish_qat takes what prepare_qat made, got {type(trained).__name__}")
    with quiet():
        done = copy.deepcopy(trained).train()
        torchao_module("export_utils")._move_exported_model_to_eval(done.graph)
    done.graph.meta["example"] = trained.example
    return _converted(done.graph, {"method": "qat", **vars(trained.scheme), "train_images": train_images})


@torch.no_grad()
def evaluate(model: Quantized | nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracy and mean cross-entropy of logits [N, classes] on batches of (images, labels [N]).

    A module is run in the mode it is in. ValueError for no batches.
    """
    right, count, loss = 0, 0, 0.0
    for images, labels in batches:
        logits = model(images)
        right += int((logits.argmax(1) == labels).sum())
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    if count == 0:
        raise ValueError("evaluate needs at least one batch with images, got none")
    return {"accuracy": right / count, "loss": loss / count}


def images_of(batches: Iterable[Any]) -> Iterator[Tensor]:
    """The images of each batch, on the CPU: the batch itself, or the first of a tuple, list or mapping.

    TypeError for others than float32 tensors, ValueError for empty batches and values that are not finite.
    """
    for number, batch in enumerate(batches):
        images = batch
        if isinstance(batch, Mapping):
            images = next(iter(batch.values()), None)
        elif isinstance(batch, Sequence):
            images = batch[0] if batch else None
        if not isinstance(images, Tensor) or images.dtype != torch.float32:
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"batch {number} must be float32 images or begin with them, got {got}")
        if images.dim() < 2 or len(images) == 0:
            raise ValueError(f"batch {number} must be images [N, ...] with N at least 1, got {tuple(images.shape)}")
        if not bool(images.isfinite().all()):
            raise ValueError(f"batch {number} has values that are NaN or infinite")
        yield images.detach().cpu()


def _on_cpu(model: nn.Module) -> nn.Module:
    return copied_model(model).cpu()


def _branches_folded(model: nn.Module) -> nn.Module:
    """Multi-branch blocks as plain convolutions; a convolution and its norm stay two."""

    def pick(name: str, module: nn.Module) -> nn.Module | None:
        if not is_block(module) or isinstance(module, ConvNormAct):
            return None
        return reparameterize(module.eval())

    return replace_modules(model, pick, is_leaf=lambda module: isinstance(module, ConvNormAct))


def _graph(model: nn.Module, images: Tensor) -> tuple[torch.fx.GraphModule, Tensor]:
    """The model as a graph for any batch size, and the batch it was traced with."""
    batch: Tensor = _batches((images,))[0][0]
    graph = _trace(model, (batch,), True).module(check_guards=False)
    assert isinstance(graph, torch.fx.GraphModule)
    return graph, batch


def _converted(prepared: torch.fx.GraphModule, info: dict[str, Any]) -> Quantized:
    import repkern

    batch: Tensor = _batches((prepared.meta["example"],))[0][0]
    with quiet():
        converted = torchao_module("quantize_pt2e").convert_pt2e(prepared)
        _drop_unused(converted)
        program = _trace(converted, (batch,), True)
    versions = {"repkern": repkern.__version__, "torch": torch.__version__}
    return Quantized(_anonymous(program), {**info, "input": list(batch.shape[1:]), **versions})


def _drop_unused(graph: torch.fx.GraphModule) -> None:
    """torchao leaves the float weights beside the integers, and a file would hold both."""
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    names = [name for name, _ in graph.named_parameters()] + [name for name, _ in graph.named_buffers()]
    for name in set(names) - used:
        parent, _, leaf = name.rpartition(".")
        delattr(graph.get_submodule(parent), leaf)


def _check_suffix(path: Path) -> None:
    if path.suffix != ".pt2":
        raise ValueError(f"the file name must end in .pt2, got {path.name!r}")
