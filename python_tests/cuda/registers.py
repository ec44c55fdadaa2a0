"""Registers and spills of every CUDA kernel, as the assembler reports them.

`python python_tests/cuda/registers.py 80 90a 100 120` prints the table; `--write` stores it as the budget.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Path(__file__).with_name("registers.csv")
_ENTRY = re.compile(r"Compiling entry function '(\S+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Usage:
    arch: str
    kernel: str
    registers: int
    stack_bytes: int


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").glob("*/*_cuda.cu"))


def measure(arch: str, source: Path) -> list[Usage]:
    """Compile one file for sm_<arch> and read the report."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-std=c++17",
            "-O3",
            "--expt-relaxed-constexpr",
        ]
        command += [f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-c", str(source), "-o", f"{folder}/kernel.o"]
        answer = subprocess.run(command, capture_output=True, text=True)
    report = answer.stdout + answer.stderr
    if answer.returncode != 0:
        raise RuntimeError(f"nvcc failed on {source.name} for sm_{arch}:\n{report[-2000:]}")
    return _parse(arch, report)


def _parse(arch: str, report: str) -> list[Usage]:
    found: list[Usage] = []
    kernel, stack = "", 0
    for line in report.splitlines():
        if entry := _ENTRY.search(line):
            kernel = _readable(entry.group(1))
        elif spill := _SPILL.search(line):
            stack = max(int(n) for n in spill.groups())
        elif used := _USED.search(line):
            found.append(Usage(arch, kernel, int(used.group(1)), stack))
    return found


def _readable(symbol: str) -> str:
    """`kernel<tile, positions>` of a mangled name."""
    if shutil.which("c++filt"):
        symbol = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    symbol = symbol.replace("(anonymous namespace)::", "").removeprefix("void ")
    symbol = re.sub(r"\(repkern::.*", "", symbol)
    return re.sub(r"repkern::|squeeze::|norm::|winograd::", "", symbol).replace(" >", ">")


def read_budget() -> dict[tuple[str, str], int]:
    """(arch, kernel) -> most registers a thread may use."""
    with BUDGET.open() as file:
        return {(row["arch"], row["kernel"]): int(row["registers"]) for row in csv.DictReader(file)}


def _main(arguments: list[str]) -> None:
    archs = [a for a in arguments if not a.startswith("--")] or ["90a"]
    rows = [usage for arch in archs for source in sources() for usage in measure(arch, source)]
    for row in rows:
        print(f"sm_{row.arch:5} {row.kernel:48} {row.registers:4} registers {row.stack_bytes:4} bytes of stack")
    if "--write" in arguments:
        with BUDGET.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["arch", "kernel", "registers"])
            writer.writerows((row.arch, row.kernel, row.registers) for row in rows)


if __name__ == "__main__":
    _main(sys.argv[1:])
