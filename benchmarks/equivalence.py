"""Every listed network with every kind of block it was published with: training form against deployed form, stored."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from repkern.bench.equivalence import equivalence_cases, run_equivalence
from repkern.bench.results import append_row, default_file_name, environment

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filter", default="*", help="a shell pattern of model names")
    parser.add_argument("--dry-run", action="store_true", help="compare, but store nothing")
    args = parser.parse_args()
    env = environment()
    path = RESULTS / default_file_name(env)
    failures = run_equivalence(
        equivalence_cases(args.filter),
        lambda row: None if args.dry_run else append_row(path, env, row),
        lambda text: print(text, file=sys.stderr),
    )
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
