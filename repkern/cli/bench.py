"""`repkern bench ops|train|blocks|conv|infer|optim|repopt|loader`: parses, calls, prints."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from repkern.bench.registry import CONV_CASES, conv_cases, load_cases
from repkern.cli._bench_rows import run
from repkern.ops import BACKENDS

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Check, then time in pairs, against what published code does.")

Shapes = Annotated[Path | None, typer.Option(help="A file of cases instead of the built-in ones, one a line.")]
Filter = Annotated[str, typer.Option(help="Only cases whose name or op contains this.")]
Quick = Annotated[bool, typer.Option(help="Fewer and shorter samples, no torch.compile: a look, not a result.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a row on stdout, all else on stderr.")]
Output = Annotated[Path | None, typer.Option(help="A CSV file to append rows to, or a folder for one.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of everybody. Default: what torch takes.")]
Pairs = Annotated[int | None, typer.Option(min=1, help="Samples of every implementation.")]

# What holds repkern, oneDNN, torch and MKL to an instruction set; read by each when it is loaded.
_FORCED_ISA = {
    "avx512": {"REPKERN_ISA": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {
        "REPKERN_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


@app.command()
def ops(
    shapes: Shapes = None,
    filter: Filter = "",
    quick: Quick = False,
    as_json: AsJson = False,
    output: Output = None,
    backend: Annotated[list[str] | None, typer.Option(help="Ours; may be repeated. Default: all native ones.")] = None,
    baseline: Annotated[list[str] | None, typer.Option(help="eager, compile, conv2d; may be repeated.")] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    pairs: Pairs = None,
    cuda_graph: Annotated[bool, typer.Option(help="Time CUDA graphs: without the host's launch overhead.")] = False,
) -> None:
    """Squeeze and composition, forward and backward, against eager torch, torch.compile and the plain convolution."""
    from repkern.bench.ops import BASELINES, OpsOptions, default_backends, run_ops

    _check_device(device)
    for name in backend or []:
        _check_backend(name)
    baselines = baseline or [name for name in BASELINES if not (quick and name == "compile")]
    for name in baselines:
        if name not in BASELINES:
            raise typer.BadParameter(f"must be one of {', '.join(BASELINES)}, got {name!r}", param_hint="--baseline")
    if dtype not in ("float32", "float64"):
        raise typer.BadParameter(f"must be float32 or float64, got {dtype!r}", param_hint="--dtype")
    if cuda_graph and device != "cuda":
        raise typer.BadParameter("needs --device cuda", param_hint="--cuda-graph")
    cases = _chosen(load_cases, shapes, filter)
    options = OpsOptions(
        backends=backend or default_backends(device),
        baselines=baselines,
        device=device,
        dtype=getattr(torch, dtype),
        pairs=pairs or (5 if quick else 15),
        min_sample_seconds=0.002 if quick else 0.01,
        max_seconds=math.inf if pairs else 12.0,
        cuda_graph=cuda_graph,
        quick=quick,
    )
    run(lambda on_row, say: run_ops(cases, options, on_row, say), output, as_json, device)


@app.command()
def train(
    shapes: Shapes = None,
    filter: Filter = "",
    quick: Quick = False,
    as_json: AsJson = False,
    output: Output = None,
    backend: Annotated[str, typer.Option(help="Our backend; auto chooses by device.")] = "auto",
    device: Device = "cpu",
    pairs: Pairs = None,
    channels_last: Annotated[bool, typer.Option(help="Model and input in channels_last.")] = False,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory.")] = True,
    grouped: Annotated[bool, typer.Option(help="Also with all squeezes in one launch (group_squeeze).")] = False,
) -> None:
    """A training step of ResNet-18: plain, OREPA in every convolution that can be one, and the unfused formulation."""
    from repkern.bench.train import TrainOptions, load_steps, run_train

    _check_device(device)
    _check_backend(backend)
    cases = _chosen(load_steps, shapes, filter)
    if quick:
        cases = [dataclasses.replace(case, batch=4, size=64, name=f"{case.name}_quick") for case in cases[:1]]
    options = TrainOptions(
        backend=backend,
        device=device,
        pairs=pairs or (3 if quick else 9),
        channels_last=channels_last,
        memory=memory,
        grouped=grouped,
    )
    run(lambda on_row, say: run_train(cases, options, on_row, say), output, as_json, device)


@app.command()
def blocks(
    shapes: Shapes = None,
    filter: Filter = "",
    quick: Quick = False,
    as_json: AsJson = False,
    output: Output = None,
    backend: Annotated[str, typer.Option(help="Our backend; auto chooses by device.")] = "auto",
    device: Device = "cpu",
    pairs: Pairs = None,
    channels_last: Annotated[bool, typer.Option(help="Model and input in channels_last.")] = False,
    memory: Annotated[bool, typer.Option(help="Also measure what is kept for the backward, and the peak.")] = True,
) -> None:
    """A training step of multi-branch networks, cheap maps kept or recomputed, against plain torch modules."""
    from repkern.bench.blocks import BlocksOptions, load_blocks, run_blocks

    _check_device(device)
    _check_backend(backend)
    cases = _chosen(load_blocks, shapes, filter)
    if quick:
        cases = [dataclasses.replace(case, batch=4, size=64, name=f"{case.name}_quick") for case in cases]
    options = BlocksOptions(backend, device, pairs or (3 if quick else 9), channels_last, memory)
    run(lambda on_row, say: run_blocks(cases, options, on_row, say), output, as_json, device)


@app.command()
def conv(
    filter: Annotated[str, typer.Option(help="Only layers whose name (as c64_112_n1) contains this.")] = "",
    layer: Annotated[list[str] | None, typer.Option(help="channels,size instead of the built-in layers.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated. Default: 1 and 8.")] = None,
    quick: Quick = False,
    as_json: AsJson = False,
    output: Output = None,
    backend: Annotated[str, typer.Option(help="Our backend; auto chooses by device.")] = "auto",
    device: Device = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, tf32, fp16 or bf16.")] = "fp32",
    tile: Annotated[list[int] | None, typer.Option(help="Of Winograd: 2, 4, 5 or 6. Default: all but 6.")] = None,
    threads: Threads = None,
    pairs: Pairs = None,
    cold: Annotated[bool, typer.Option(help="Also with many copies of the weights in turn.")] = True,
    ncnn: Annotated[bool, typer.Option(help="Also against ncnn's Winograd, where it is installed.")] = True,
    isa: Annotated[str, typer.Option(help="avx2 or avx512: neither side may use more.")] = "",
) -> None:
    """3x3 convolutions of VGG-like networks: Winograd and direct, against torch.conv2d and ncnn."""
    from repkern.bench.conv import ConvOptions, run_conv
    from repkern.bench.conv_methods import DTYPES
    from repkern.ops.winograd_conv2d import TILES

    _check_device(device)
    _check_backend(backend)
    _one_of(precision, DTYPES, "--precision")
    for value in tile or []:
        _one_of(value, TILES, "--tile")
    if isa:
        _one_of(isa, _FORCED_ISA, "--isa")
        if not all(os.environ.get(name) == value for name, value in _FORCED_ISA[isa].items()):
            raise typer.Exit(_again_with(_FORCED_ISA[isa]))
    _use_threads(threads)
    words, batches = " ".join(layer) if layer else CONV_CASES, tuple(batch or (1, 8))
    options = ConvOptions(
        backend=backend,
        device=device,
        how=precision,
        tiles=tile or (2, 4, 5),
        threads=torch.get_num_threads(),
        ncnn=ncnn and not isa,  # ncnn cannot be held to an instruction set
        cold=cold and not quick and device == "cpu",
        choosing_pairs=3 if quick else 7,
        pairs=pairs or (3 if quick else 15),
        min_sample_seconds=0.002 if quick else 0.01,
    )
    try:
        cases = _filtered(conv_cases(words, batches), filter)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layer") from None
    run(lambda on_row, say: run_conv(cases, options, on_row, say), output, as_json, device)


@app.command()
def infer(
    models: Annotated[list[str] | None, typer.Argument(help="Default: repvgg_a0 repvgg_a2 repvgg_b1.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated. Default: 1 and 8.")] = None,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 224,
    quick: Quick = False,
    as_json: AsJson = False,
    output: Output = None,
    device: Device = "cpu",
    precision: Annotated[str, typer.Option(help="fp32; on a GPU also tf32 or fp16.")] = "fp32",
    rivals: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: all that run there.")] = None,
    threads: Threads = None,
    pairs: Pairs = None,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory.")] = True,
) -> None:
    """Deployed networks: optimize_for_inference against torch, torch.compile, ONNX Runtime, OpenVINO and ncnn."""
    from repkern.bench.infer import DEFAULT_MODELS, InferOptions, run_infer
    from repkern.bench.rivals import OURS, PRECISIONS, names_for
    from repkern.models import list_models

    _check_device(device)
    _one_of(precision, PRECISIONS if device == "cuda" else ("fp32",), "--precision")
    models = models or list(DEFAULT_MODELS[:1] if quick else DEFAULT_MODELS)
    for name in models:
        if name not in list_models():
            raise typer.BadParameter(f"{name!r} is no network; `repkern models` lists them", param_hint="MODELS")
    known = [name for name in names_for(device) if name != OURS]
    for name in rivals or []:
        _one_of(name, known, "--rivals")
    _use_threads(threads)
    options = InferOptions(
        rivals=rivals or [name for name in known if not (quick and name.startswith("compile"))],
        batches=batch or ((1,) if quick else (1, 8)),
        size=size,
        threads=torch.get_num_threads(),
        device=device,
        precision=precision,
        pairs=pairs or (3 if quick else 15),
        min_sample_seconds=0.02 if quick else 0.05,
        memory=memory and not quick,
    )
    run(lambda on_row, say: run_infer(models, options, on_row, say), output, as_json, device)


def _one_of(value: object, allowed: Iterable[object], option: str) -> None:
    if value not in (allowed := list(allowed)):
        raise typer.BadParameter(f"must be one of {', '.join(map(str, allowed))}, got {value!r}", param_hint=option)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _again_with(environment: dict[str, str]) -> int:
    """This command once more in a process that knows `environment` from its start; its exit code."""
    return subprocess.run([sys.executable, *sys.orig_argv[1:]], check=False, env=os.environ | environment).returncode


@app.command()
def optim(
    filter: Filter = "",
    quick: Quick = False,
    as_json: AsJson = False,
    output: Output = None,
    backend: Annotated[str, typer.Option(help="Our backend; auto chooses by device.")] = "auto",
    device: Device = "cpu",
    pairs: Pairs = None,
) -> None:
    """A step of RepSGD and RepAdamW on a network's parameters, against torch's fused ones and the released code."""
    from repkern.bench.optim import OptimOptions, optim_cases, run_optim

    _check_device(device)
    _check_backend(backend)
    cases = _chosen(lambda _: optim_cases(), None, filter)
    options = OptimOptions(backend, device, pairs or (3 if quick else 15), 0.125 if quick else 1.0)
    if quick:
        cases = [dataclasses.replace(case, name=f"{case.name}_quick") for case in cases]
    run(lambda on_row, say: run_optim(cases, options, on_row, say), output, as_json, device)


@app.command()
def repopt(
    filter: Filter = "",
    quick: Quick = False,
    as_json: AsJson = False,
    output: Output = None,
    backend: Annotated[str, typer.Option(help="Our backend; auto chooses by device.")] = "auto",
    device: Device = "cpu",
    pairs: Pairs = None,
    channels_last: Annotated[bool, typer.Option(help="Models and input in channels_last.")] = False,
) -> None:
    """A training step of a plain network with RepSGD, against RepVGG in plain torch modules and in our blocks."""
    from repkern.bench.repopt import RepOptOptions, repopt_cases, run_repopt

    _check_device(device)
    _check_backend(backend)
    cases = _chosen(lambda _: repopt_cases(), None, filter)
    options = RepOptOptions(backend, device, pairs or (3 if quick else 7), channels_last, 0.125 if quick else 1.0)
    if quick:
        cases = [dataclasses.replace(case, batch=4, size=64, name=f"{case.name}_quick") for case in cases]
    run(lambda on_row, say: run_repopt(cases, options, on_row, say), output, as_json, device)


@app.command()
def loader(
    quick: Quick = False,
    as_json: AsJson = False,
    output: Output = None,
    workers: Annotated[list[int] | None, typer.Option(min=0, help="May be repeated. Default: 0 and 1.")] = None,
    pairs: Pairs = None,
) -> None:
    """Reading images: a training step that decodes and augments, against data in memory; decoding with two workers."""
    from repkern.bench.loader import LoaderOptions, run_loader

    count = pairs or (3 if quick else 7)
    options = LoaderOptions(workers=tuple(workers or (0, 1)), pairs=count)
    if quick:
        options = dataclasses.replace(options, steps=2, large_batches=4, width=0.25, suffix="_quick")
    run(lambda on_row, say: run_loader(options, on_row, say), output, as_json, "cpu")


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu or cuda, got {device!r}", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA GPU was found; use --device cpu", param_hint="--device")


def _check_backend(name: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise typer.BadParameter(f"must be one of auto, {', '.join(BACKENDS)}, got {name!r}", param_hint="--backend")


def _chosen(load: Callable[[Path | None], list[Any]], shapes: Path | None, filter: str) -> list[Any]:
    try:
        cases = load(shapes)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--shapes") from None
    return _filtered(cases, filter)


def _filtered(cases: list[Any], filter: str) -> list[Any]:
    chosen = [case for case in cases if filter in case.name or filter in getattr(case, "op", "")]
    if not chosen:
        names = ", ".join(case.name for case in cases)
        raise typer.BadParameter(f"no case matches {filter!r}; there are: {names}", param_hint="--filter")
    return chosen
