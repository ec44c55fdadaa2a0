"""`repkern bench ops|train|blocks`: parses, calls, prints."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from repkern.bench import results
from repkern.bench.registry import load_cases
from repkern.bench.results import Row
from repkern.cli._console import INTERRUPTED, fail, terminated_like_ctrl_c
from repkern.ops import BACKENDS

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Check, then time in pairs, against what published code does.")

Shapes = Annotated[Path | None, typer.Option(help="A file of cases instead of the built-in ones, one a line.")]
Filter = Annotated[str, typer.Option(help="Only cases whose name or op contains this.")]
Quick = Annotated[bool, typer.Option(help="Fewer and shorter samples, no torch.compile: a look, not a result.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a row on stdout, all else on stderr.")]
Output = Annotated[Path | None, typer.Option(help="A CSV file to append rows to, or a folder for one.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Pairs = Annotated[int | None, typer.Option(min=1, help="Samples of every implementation.")]


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
    _run(lambda on_row, say: run_ops(cases, options, on_row, say), output, as_json, device)


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
    _run(lambda on_row, say: run_train(cases, options, on_row, say), output, as_json, device)


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
    _run(lambda on_row, say: run_blocks(cases, options, on_row, say), output, as_json, device)


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
    chosen = [case for case in cases if filter in case.name or filter in getattr(case, "op", "")]
    if not chosen:
        names = ", ".join(case.name for case in cases)
        raise typer.BadParameter(f"no case matches {filter!r}; there are: {names}", param_hint="--filter")
    return chosen


def _run(
    measure: Callable[[Callable[[Row], None], Callable[[str], None]], list[str]],
    output: Path | None,
    as_json: bool,
    device: str,
) -> None:
    """Run, printing and storing every row when it comes. Exit 1 after a failed check, 130 after Ctrl-C."""
    env = results.environment(device)
    path = output / results.default_file_name(env) if output is not None and output.is_dir() else output

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    def on_row(row: Row) -> None:
        if path is not None:
            results.append_row(path, env, row)
        if as_json:
            print(json.dumps(dataclasses.asdict(env) | dataclasses.asdict(row)), flush=True)
        else:
            say(_line(row))

    say(
        f"{env.gpu or env.cpu}, {env.threads} threads, {env.isa}; torch {env.torch}; repkern {env.repkern} {env.commit}"
    )
    try:
        with terminated_like_ctrl_c():
            failures = measure(on_row, say)
    except KeyboardInterrupt:
        say("interrupted; the rows so far are kept" + (f" in {path.name}" if path else ""))
        raise typer.Exit(INTERRUPTED) from None
    except (RuntimeError, ValueError) as error:
        fail(str(error))
    if failures:
        fail("check failed: " + "; ".join(failures))


def _line(row: Row) -> str:
    name = f"  {row.case:<18} {row.what:<16} {row.backend:<10}"
    gap = f"  {row.target}: {row.verdict}" if row.target else ""
    if row.kind == "blocks-memory":
        return f"{name} {row.extra_mib:8.1f} MiB, {row.ratio:.2f} x {row.baseline} at {row.limit_mib:.1f} MiB{gap}"
    if row.kind == "memory":
        return f"{name} {row.extra_mib:8.1f} MiB over plain, limit {row.limit_mib:.1f} MiB{gap}"
    time = f"{name} {row.ms:9.3f} ms"
    if not row.baseline:
        return f"{time}  {row.gflops:6.1f} GFLOP/s  {row.peak_percent:5.1f} % of peak{gap}"
    spread = f"(p20 {row.ratio_p20:.2f}, p80 {row.ratio_p80:.2f})"
    meaning = f"x {row.baseline}" if row.kind in ("train", "blocks") else f"x faster than {row.baseline}"
    return f"{time}  {row.ratio:6.2f} {meaning} at {row.baseline_ms:.3f} ms {spread}{gap}"
