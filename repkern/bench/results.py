"""Result rows: the columns, where and with what they were measured, and a CSV file that is only ever appended to."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import repkern
from repkern import _native

__all__ = ["Environment", "Row", "append_row", "default_file_name", "environment", "read_rows"]


@dataclass(frozen=True)
class Environment:
    """Where and with what a row was measured. Carries no host name and no path."""

    date: str
    commit: str
    repkern: str
    torch: str
    triton: str
    python: str
    cpu: str
    cores: int
    threads: int
    isa: str
    gpu: str


@dataclass(frozen=True)
class Row:
    """One comparison. Times are milliseconds; `ratio` is baseline / ours over pairs (of networks: ours / baseline).

    Memory is above the baseline's (kind memory); what blocks keep is their own, with the baseline's as `limit_mib`.
    """

    kind: str  # ops, train, memory, blocks or blocks-memory
    op: str
    case: str
    what: str  # forward, backward, forward+backward, step, peak or activations
    dtype: str
    device: str
    mode: str  # eager, or cuda-graph
    backend: str
    ms_p20: float | None = None
    ms: float | None = None
    ms_p80: float | None = None
    baseline: str = ""
    baseline_ms: float | None = None
    ratio_p20: float | None = None
    ratio: float | None = None
    ratio_p80: float | None = None
    pairs: int = 0
    gflops: float | None = None
    gbytes_per_s: float | None = None
    peak_percent: float | None = None
    peak_gflops: float | None = None
    peak_source: str = ""
    error_over_bound: float | None = None
    extra_mib: float | None = None
    limit_mib: float | None = None
    target: str = ""
    verdict: str = ""


COLUMNS = [field.name for field in fields(Environment)] + [field.name for field in fields(Row)]


def environment(device: str = "cpu") -> Environment:
    """This machine and these versions, now."""
    info = _native.native_build_info()
    return Environment(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=_commit(),
        repkern=repkern.__version__,
        torch=torch.__version__,
        triton=_version_of("triton"),
        python=platform.python_version(),
        cpu=_cpu_name(),
        cores=os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        isa=str(info.get("isa_used", "none (no native module)")),
        gpu=torch.cuda.get_device_name() if device == "cuda" else "",
    )


def default_file_name(env: Environment) -> str:
    """Machine and versions, as a file name."""
    machine = f"gpu-{env.gpu}" if env.gpu else f"cpu-{env.cpu}-{env.threads}t-{env.isa}"
    text = f"{machine}-torch{env.torch}-py{env.python}-repkern{env.repkern}"
    return re.sub(r"[^a-z0-9._]+", "-", text.lower().replace("(r)", "").replace("(tm)", "")).strip("-") + ".csv"


def append_row(path: Path, env: Environment, row: Row) -> None:
    """Write one row and close the file, so that an interrupted run keeps what it measured.

    ValueError when the file has other columns.
    """
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != COLUMNS:
            raise ValueError(f"{path.name} has other columns than this version of repkern writes; choose a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in {**asdict(env), **asdict(row)}.items()})


def read_rows(paths: Iterable[Path]) -> list[dict[str, str]]:
    """All rows of all files, in file and line order, as text."""
    rows: list[dict[str, str]] = []
    for path in sorted(paths):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else value


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the checkout this package runs from, "+" when kernels or package differ from it; else empty."""
    root = Path(repkern.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "repkern", "csrc")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changed else "")


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()
