"""Rows of `repkern bench` as they come: printed, as JSON, or appended to a file."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from repkern.bench import results
from repkern.bench.results import Row
from repkern.cli._console import INTERRUPTED, fail, terminated_like_ctrl_c

__all__ = ["run"]


def run(
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
    if row.kind == "conv":
        name = f"  {row.case:<13} {row.what:<38} {'cold' if row.mode == 'cold weights' else 'warm'}"
    gap = f"  {row.target}: {row.verdict}" if row.target else ""
    if row.kind == "optim-memory":
        return f"{name} {row.extra_mib:8.3f} MiB, {row.ratio:.3f} % of {row.limit_mib:.1f} MiB of {row.baseline}{gap}"
    if row.kind in ("blocks-memory", "infer-memory"):
        return f"{name} {row.extra_mib:8.1f} MiB, {row.ratio:.2f} x {row.baseline} at {row.limit_mib:.1f} MiB{gap}"
    if row.kind == "loader":
        meaning = "x" if row.what == "step" else "x faster than"
        spread = f"(p20 {row.ratio_p20:.2f}, p80 {row.ratio_p80:.2f})"
        against = f"{row.ratio:6.3f} {meaning} {row.baseline} at {row.baseline_ms:.3f} ms"
        return f"{name} {row.ms:9.3f} ms  {against} {spread}{gap}"
    if row.kind == "conv-median":
        how = "cold" if row.mode == "cold weights" else "warm"
        return f"  {row.case:<13} {row.what:<38} {how} {row.ratio:6.2f} x faster than {row.baseline}{gap}"
    if row.kind == "memory":
        return f"{name} {row.extra_mib:8.1f} MiB over plain, limit {row.limit_mib:.1f} MiB{gap}"
    time = f"{name} {row.ms:9.3f} ms"
    if not row.baseline:
        return f"{time}  {row.gflops:6.1f} GFLOP/s  {row.peak_percent:5.1f} % of peak{gap}"
    spread = f"(p20 {row.ratio_p20:.2f}, p80 {row.ratio_p80:.2f})"
    meaning = f"x {row.baseline}" if row.kind in ("train", "blocks") else f"x faster than {row.baseline}"
    return f"{time}  {row.ratio:6.2f} {meaning} at {row.baseline_ms:.3f} ms {spread}{gap}"
