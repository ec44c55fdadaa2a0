"""Measure everything on this machine, append to results/, write the documents. Exit code 1 after a failed check."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def commands(device: str, quick: bool) -> list[list[str]]:
    common = ["--device", device, "--output", str(RESULTS)] + (["--quick"] if quick else [])
    answer = [["ops", *common], ["train", *common], ["blocks", *common], ["blocks", *common, "--channels-last"]]
    if device == "cuda":
        answer.insert(1, ["ops", *common, "--cuda-graph", "--baseline", "eager"])
        for how in ("fp32", "tf32", "fp16"):
            answer += [["conv", *common, "--precision", how], ["infer", *common, "--precision", how]]
    else:
        answer += [["conv", *common], ["conv", *common, "--isa", "avx2"], ["infer", *common]]
        answer += [["loader", *common[2:]]]
    answer += [["optim", *common], ["repopt", *common]]
    return answer


def run_tests() -> int:
    """The op tests on every backend this machine has; their counts go to results/tests.csv."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        words = ["-m", "pytest", "-q", "python_tests/test_all_ops.py", f"--junitxml={junit}"]
        code = subprocess.run([sys.executable, *words], check=False, cwd=HERE.parent).returncode
        recorded = subprocess.run([sys.executable, str(HERE / "record_tests.py"), str(junit)], check=False).returncode
    return max(code, recorded)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a look: rows are stored too, so do not commit them")
    parser.add_argument("--tests", action="store_true", help="also run the op tests and store their counts")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)  # git keeps no empty folder
    codes = [run_tests()] if args.tests else []
    codes += [
        subprocess.run(
            [sys.executable, "-m", "repkern.cli.main", "bench", *words], check=False, cwd=HERE.parent
        ).returncode
        for words in commands(args.device, args.quick)
    ]
    codes.append(subprocess.run([sys.executable, str(HERE / "make_docs.py")], check=False).returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
