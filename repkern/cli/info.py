"""`repkern info`: what is installed, and what it can run on here."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.markup import escape

from repkern.cli._console import console, print_pairs

__all__ = ["info"]


def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False) -> None:
    """Show versions, CPU, GPU, and which backends run here, or why not.

    [bold]Examples[/]

    repkern info              a table to read or to paste into a bug report

    repkern info --json       the same for a program
    """
    from repkern import build_info

    found = build_info()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    rows = [(name, escape(text)) for name, text in _rows(found)]
    for backend, reason in found["backends"].items():
        mark = "[green]available[/]" if reason is None else f"[yellow]no[/]: {escape(reason)}"
        rows.append((f"backend {backend}", mark))
    print_pairs(console(), rows)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, native, cuda, openmp = found["cpu"], found["native"], found["cuda"], found["openmp"]
    rows = [
        ("repkern", found["repkern"]),
        ("python", f"{found['python']} on {found['platform']}"),
        ("torch", f"{found['torch']}, " + (f"CUDA {cuda['torch_cuda']}" if cuda["torch_cuda"] else "CPU only")),
        ("triton", found["triton"] or "not installed"),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads in use"),
        ("instruction set", _isa(cpu)),
        ("native code", _native(native)),
        ("CUDA kernels", _built(cuda)),
        ("GPU", _gpus(cuda)),
        ("OpenMP", _openmp(openmp)),
    ]
    if found["backend_forced"]:
        rows.append(("REPKERN_BACKEND", found["backend_forced"]))
    return rows


def _isa(cpu: dict[str, Any]) -> str:
    if cpu["isa_found"] is None:
        return "unknown without the native code"
    if cpu["isa_used"] == cpu["isa_found"]:
        return cpu["isa_used"]
    return f"{cpu['isa_used']} (this CPU has {cpu['isa_found']}; REPKERN_ISA asked for less)"


def _native(native: dict[str, Any]) -> str:
    if not native["built"]:
        return f"none: {native['missing']}"
    sanitizer = ", with sanitizers (slow: for tests)" if native["sanitized"] else ""
    return f"built by compiler {native['compiler']}{sanitizer}"


def _built(cuda: dict[str, Any]) -> str:
    if cuda["built"] is None:
        return "not built"
    return f"built by CUDA {cuda['built']} for {', '.join(cuda['archs'])}"


def _gpus(cuda: dict[str, Any]) -> str:
    driver = f"driver {cuda['driver']}" if cuda["driver"] else "no NVIDIA driver"
    if not cuda["gpus"]:
        return f"none ({driver})"
    names = [f"{g['name']} ({g['capability']}, {g['memory_bytes'] / 2**30:.0f} GiB)" for g in cuda["gpus"]]
    return f"{', '.join(names)}, {driver}"


def _openmp(openmp: dict[str, Any]) -> str:
    names = ", ".join(openmp["runtimes"]) or "no runtime found"
    verdict = {True: "shared by torch and repkern", False: "NOT shared: two thread pools", None: "sharing unknown"}
    return f"{names} ({verdict[openmp['shared']]})"
