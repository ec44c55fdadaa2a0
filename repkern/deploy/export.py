"""export: a trained model -> an ONNX or torch.export file, proven to compute the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repkern.deploy._formats import FORMATS, Format, Options, needs
from repkern.models.files import replaced
from repkern.models.network import Network
from repkern.models.saving import describe
from repkern.nn import reparameterize
from repkern.nn.verify import Difference, Example, Reference, ReparameterizeReport, arguments

__all__ = ["FILE_SUFFIXES", "BatchCheck", "ExportReport", "export"]

#: What the name of an exported file ends in.
FILE_SUFFIXES = tuple(FORMATS)


@dataclass(frozen=True)
class BatchCheck:
    """The written file, run on `batch` images, against the training form: one `Difference` per output."""

    batch: int
    outputs: list[Difference]

    @property
    def worst(self) -> Difference:
        """The output with the largest relative difference."""
        return max(self.outputs, key=lambda output: output.relative)


@dataclass
class ExportReport:
    """What `export` wrote and found: `conversion` is reparameterize's report, `checks` those of the written file."""

    path: str
    format: str
    dynamic_batch: bool
    size_bytes: int = 0
    conversion: ReparameterizeReport = field(default_factory=ReparameterizeReport)
    checks: list[BatchCheck] = field(default_factory=list)

    @property
    def worst(self) -> BatchCheck | None:
        """The check with the largest relative difference; None without verification."""
        return max(self.checks, key=lambda check: check.worst.relative, default=None)

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        checks = [
            {"batch": check.batch, "outputs": [output.as_json() for output in check.outputs]} for check in self.checks
        ]
        own = {name: value for name, value in vars(self).items() if name not in ("conversion", "checks")}
        return own | {"checks": checks, "conversion": self.conversion.as_json()}

    def __str__(self) -> str:
        batches = "any batch size" if self.dynamic_batch else "one batch size"
        lines = [f"{self.path}: {self.format}, {batches}, {self.size_bytes:,} bytes"]
        lines += [f"  batch {check.batch}, {check.worst}" for check in self.checks]
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: str | Path,
    example: Example,
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    verify: bool = True,
) -> ExportReport:
    """Write the deployed form of `model` to an .onnx or .pt2 (torch.export) file, and prove that it is the same.

    The model (any, with or without blocks, in training or plain form) is reparameterized, traced by torch.export in
    eval mode and written; the given one stays as it is. The file appears only when all checks have passed.

    example: an input tensor or a tuple of arguments. dynamic_batch: the first dimension of all tensors among them is
    free in the file; otherwise the example's sizes are fixed. opset: of ONNX, default torch's. input_names,
    output_names: in an ONNX file, default input and output, numbered where there are several.
    verify: the plain model is compared as by `reparameterize(verify=)`; then the file is read back, an ONNX file
    checked by onnx's checker and run by onnxruntime, a .pt2 file run by torch, and the outputs are compared with the
    float64 training form, with dynamic_batch on three batch sizes. ValueError beyond the bound of `reparameterize`,
    naming difference and place. Without `verify` only onnx's checker runs.

    ValueError also for another suffix, and where torch.export or the format cannot express the model; ImportError when
    the packages of repkern[export] are missing. UserWarning as `reparameterize`.
    """
    path = Path(path)
    chosen = _format_of(path)
    if opset is not None and path.suffix != ".onnx":
        raise ValueError(f"opset (={opset}) is for .onnx files, the path is {path.name!r}")
    args = arguments(example)
    report = ExportReport(str(path), chosen.name, dynamic_batch)
    plain = reparameterize(model, verify=args if verify else None, report=report.conversion)
    batches = _batches(args) if dynamic_batch else [args]
    program = _trace(plain.eval(), batches[0], dynamic_batch)
    outputs = len(program.graph_signature.user_outputs)
    options = Options(
        opset, input_names or _numbered("input", _count_tensors(args)), output_names or _numbered("output", outputs)
    )
    with replaced(path) as temporary:
        try:
            chosen.write(program, temporary, options, _metadata(plain))
        except Exception as problem:  # exporters have no common type for what they cannot express
            raise ValueError(
                f"export: the model cannot be written as {chosen.name}: {_first_line(problem)}"
            ) from problem
        if verify:
            _check(model, temporary, chosen, batches, report)
        report.size_bytes = temporary.stat().st_size
    return report


def _format_of(path: Path) -> Format:
    if path.suffix not in FORMATS:
        raise ValueError(f"the file name must end in {' or '.join(FORMATS)}, got {path.name!r}")
    chosen = FORMATS[path.suffix]
    needs(chosen)
    return chosen


def _numbered(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}_{at}" for at in range(count)]


def _count_tensors(args: Sequence[Any]) -> int:
    return sum(isinstance(arg, Tensor) for arg in args)


def _batches(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arguments with as many items as the example (at least two), with one, and with two more.

    The first one is traced: torch.export takes a batch of one for a constant. Added items are shifted ones of the
    example, so that no two are alike and values stay in the range that the model knows.
    """
    sizes = {arg.shape[0] for arg in args if isinstance(arg, Tensor) and arg.dim() > 0}
    if len(sizes) != 1:
        raise ValueError(
            f"dynamic_batch=True needs one common first dimension of all tensors, got {sorted(sizes)}; "
            "use dynamic_batch=False"
        )
    size = sizes.pop()
    if size < 1:
        raise ValueError("the example must have at least one item, got an empty batch")
    return [tuple(_resized(arg, count) for arg in args) for count in (max(size, 2), 1, size + 2)]


def _resized(arg: Any, count: int) -> Any:
    if not isinstance(arg, Tensor) or arg.dim() == 0:
        return arg
    items = [arg[at % len(arg)] for at in range(count)]
    return torch.stack([item.flatten().roll(at // len(arg)).view_as(item) for at, item in enumerate(items)])


def _trace(plain: nn.Module, args: tuple[Any, ...], dynamic_batch: bool) -> ExportedProgram:
    batch = Dim("batch")
    free = [{0: batch} if isinstance(arg, Tensor) and arg.dim() > 0 else None for arg in args]
    try:
        with torch.no_grad():
            program = torch.export.export(plain, args, dynamic_shapes=tuple(free) if dynamic_batch else None)
    except Exception as problem:  # torch.export has many types for what it cannot trace
        raise ValueError(f"export: torch.export cannot trace the model: {_first_line(problem)}") from problem
    return _anonymous(program)


def _anonymous(program: ExportedProgram) -> ExportedProgram:
    """Without the example's pixels and the folders of this machine, which torch would write into the file."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _metadata(plain: nn.Module) -> dict[str, str]:
    import repkern

    described: dict[str, Any] = {}
    if isinstance(plain, Network):
        try:
            described = {"model": json.dumps(describe(plain))}
        except ValueError:  # a description is welcome here, not needed
            described = {}
    return {"repkern": repkern.__version__, **described}


def _check(
    model: nn.Module, path: Path, chosen: Format, batches: Sequence[tuple[Any, ...]], report: ExportReport
) -> None:
    """Fill report.checks; ValueError beyond a bound."""
    try:
        run = chosen.open(path)
    except Exception as problem:  # onnxruntime has its own types for what it has no kernel for
        raise ValueError(
            f"export: the {chosen.name} file cannot be opened by its runtime: {_first_line(problem)}"
        ) from problem
    for args in batches:
        reference = Reference(model, args)
        reference.require_finite()
        names = [f"output {at}" for at in range(len(reference.outputs))]
        batch = next((len(arg) for arg in args if isinstance(arg, Tensor) and arg.dim() > 0), 1)
        try:
            outputs = run(args)
        except Exception as problem:  # as above, and torch's own for a .pt2 file
            raise ValueError(
                f"export: the {chosen.name} file cannot be run on a batch of {batch}: {_first_line(problem)}"
            ) from problem
        check = BatchCheck(batch, reference.differences(outputs, names if len(names) > 1 else ["the output"]))
        report.checks.append(check)
        for output in check.outputs:
            if not output.within_bound:
                raise ValueError(
                    f"export: the {chosen.name} file differs from the training form on a batch of {batch}: {output}"
                )


def _first_line(problem: Exception) -> str:
    text = str(problem).strip()
    return text.splitlines()[0] if text else type(problem).__name__
