"""The two file formats of `export`: how each is written, and how it is read back and run."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from repkern.models.zip_sums import check_archive, seal_archive

__all__ = ["FORMATS", "Format", "Options", "needs"]

Runner = Callable[[Sequence[Any]], list[Tensor]]
_METADATA = "repkern.json"


class Options(NamedTuple):
    """What only one of the formats asks for. None: the default of torch, or names made from numbers."""

    opset: int | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None


class Format(NamedTuple):
    """packages: what must be installed. write(program, path, options, metadata). open(path) -> run(args)."""

    name: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, Options, Mapping[str, str]], None]
    open: Callable[[Path], Runner]


def needs(chosen: Format) -> None:
    """ImportError, with the command that helps, unless the format's packages are installed."""
    import importlib.util

    missing = [name for name in chosen.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"exporting to {chosen.name} needs {', '.join(missing)}: pip install 'repkern[export]'")


def _write_pt2(program: ExportedProgram, path: Path, options: Options, metadata: Mapping[str, str]) -> None:
    import json

    with _quiet():
        torch.export.save(program, path, extra_files={_METADATA: json.dumps(dict(metadata))})
    seal_archive(path)


def _open_pt2(path: Path) -> Runner:
    with _quiet():
        check_archive(path)
        module = torch.export.load(path).module()

    def run(args: Sequence[Any]) -> list[Tensor]:
        with torch.no_grad():
            return _floating(torch.utils._pytree.tree_leaves(module(*args)))

    return run


def _write_onnx(program: ExportedProgram, path: Path, options: Options, metadata: Mapping[str, str]) -> None:
    import onnx

    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=options.opset,
            input_names=options.input_names,
            output_names=options.output_names,
        )
    assert exported is not None
    proto = exported.model_proto
    _check_opset(proto, options.opset)
    _rename_batch(proto)
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.save(proto, str(path))
    onnx.checker.check_model(str(path), full_check=True)


def _check_opset(proto: Any, wanted: int | None) -> None:
    """torch converts from its own opset to the wanted one, and keeps its own where that fails."""
    found = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if wanted is not None and found != wanted:
        raise ValueError(f"opset {wanted} is not possible for this model with this torch and onnx, they give {found}")


def _rename_batch(proto: Any) -> None:
    """The dynamic dimension is called "batch"; torch names it after its own symbol."""
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    for dim in (dim for value in values for dim in value.type.tensor_type.shape.dim):
        if dim.dim_param and dim.dim_param.isidentifier():
            dim.dim_param = "batch"


def _open_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(args: Sequence[Any]) -> list[Tensor]:
        tensors = [arg.detach().cpu().numpy() for arg in args if isinstance(arg, Tensor)]
        outputs = session.run(None, dict(zip(names, tensors, strict=True)))
        return _floating([torch.from_numpy(output) for output in outputs])

    return run


def _floating(outputs: Sequence[Any]) -> list[Tensor]:
    return [out.detach().cpu() for out in outputs if isinstance(out, Tensor) and out.is_floating_point()]


FORMATS = {
    ".onnx": Format("ONNX", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
    ".pt2": Format("torch.export", (), _write_pt2, _open_pt2),
}


# Logger -> how the messages begin that say nothing about the file: four operators of a package that is not installed
# are skipped; an opset is reached by conversion, or is not, which _check_opset finds out.
_NOISE = {
    "torch.onnx._internal.exporter._registration": ("torchvision is not installed",),
    "torch.onnx._internal.exporter._compat": ("Setting ONNX exporter to use operator set version",),
    "onnxscript.version_converter": ("The model version conversion is not supported", "Failed to convert the model"),
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say about themselves on every run; anything else still comes through."""
    added = []
    for name, beginnings in _NOISE.items():
        logger = logging.getLogger(name)
        keep = functools.partial(_says_something, beginnings)
        logger.addFilter(keep)
        added.append((logger, keep))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        for logger, keep in added:
            logger.removeFilter(keep)


def _says_something(beginnings: tuple[str, ...], record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginnings)
