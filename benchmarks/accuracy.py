"""Logits of deployed networks under optimize_for_inference against float64 on random images, stored; can be resumed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from repkern.bench.accuracy import AccuracyCase, accuracy_rows, compare
from repkern.bench.results import append_row, default_file_name, environment

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# Git ignores it.
STATE = HERE.parent / "build" / "accuracy"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["repvgg_a0", "repvgg_b1"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--chunk", type=int, default=8, help="images in a batch, and what an interruption loses")
    parser.add_argument("--dry-run", action="store_true", help="compare, but store no rows")
    args = parser.parse_args()
    env = environment()
    path = RESULTS / default_file_name(env)
    short = False
    for model in args.models:
        case = AccuracyCase(model, args.images, args.size, args.chunk)
        state = STATE / f"{model}-{args.size}-{args.chunk}.jsonl"
        found = compare(case, lambda text: print(text, file=sys.stderr, flush=True), state=state)
        for row in accuracy_rows(case, found):
            short |= row.verdict.startswith("short")
            if row.verdict:
                print(f"{row.case} {row.what}: {row.target}, {row.verdict}")
            if not args.dry_run:
                append_row(path, env, row)
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
