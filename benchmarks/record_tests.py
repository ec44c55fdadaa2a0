"""Append to results/tests.csv what a pytest run said about each backend: record_tests.py junit.xml.

A test belongs to the backend that its parameters name, as in test_all_ops.py[cuda-...]; others are not counted.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch

from repkern.bench.results import environment
from repkern.ops import BACKENDS

TESTS = Path(__file__).resolve().parent / "results" / "tests.csv"
COLUMNS = ["date", "commit", "torch", "cpu", "gpu", "device", "backend", "passed", "failed", "skipped"]


def target_of(name: str) -> tuple[str, str] | None:
    """(backend, device) of a test name such as test_x[f32-triton-cuda-sample]: repkern.testing.Target's form."""
    parameters = name.partition("[")[2].rstrip("]").split("-")
    backend = next((part for part in parameters if part in BACKENDS), None)
    return None if backend is None else (backend, "cuda" if "cuda" in parameters else "cpu")


def count(junit: Path) -> dict[tuple[str, str], Counter[str]]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        target = target_of(case.get("name", ""))
        if target is None:
            continue
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        counts.setdefault(target, Counter())[outcome] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("junit", type=Path)
    parser.add_argument("--output", type=Path, default=TESTS)
    args = parser.parse_args()
    env = environment("cuda" if torch.cuda.is_available() else "cpu")
    new = not args.output.exists()
    with args.output.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for (backend, device), outcomes in sorted(count(args.junit).items()):
            said = [outcomes[name] for name in ("passed", "failed", "skipped")]
            writer.writerow([env.date, env.commit, env.torch, env.cpu, env.gpu, device, backend, *said])
    return 0


if __name__ == "__main__":
    sys.exit(main())
