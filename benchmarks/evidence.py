"""The queue of the evidence table: short trainings, paired by seed, each stored as soon as it is done. Run it again to
go on where it stopped."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from repkern.bench.evidence import ARMS, SETTINGS, Case, EvidenceRow, append_row, pending, plan, read_evidence
from repkern.bench.evidence_data import EvidenceData, open_data
from repkern.bench.evidence_networks import NETWORKS
from repkern.bench.evidence_run import run
from repkern.bench.results import environment
from repkern.train.trainer import Interrupted, TrainingDivergedError

RESULTS = Path(__file__).resolve().parent / "results" / "evidence.csv"


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    setting = SETTINGS[args.setting]
    stored = read_evidence(args.results)
    cases = list(pending(plan(args.networks, range(args.seeds), setting, args.arms or None), stored))
    print(f"{len(cases)} runs to do, {len(stored)} rows stored", flush=True)
    if args.dry_run or not cases:
        for case in cases:
            print(describe(case))
        return 0
    end = time.monotonic() + 60 * args.minutes
    data = open_data(setting, args.data)
    for number, case in enumerate(cases, 1):
        if time.monotonic() > end:
            print(f"time is up, {len(cases) - number + 1} runs left", flush=True)
            return 0
        try:
            store(case, data, stored, args.results, f"{number}/{len(cases)}")
        except TrainingDivergedError as problem:
            print(f"{number}/{len(cases)} {describe(case)}: no row, {problem}", file=sys.stderr, flush=True)
        except Interrupted:
            print(f"stopped; {len(cases) - number + 1} runs left", flush=True)
            return 130
    return 0


def store(case: Case, data: EvidenceData, stored: Sequence[dict[str, str]], results: Path, place: str) -> None:
    began = time.monotonic()
    for row in missing(case, data, stored):
        append_row(results, environment(), row)
        what = describe(case._replace(arm=dataclasses.replace(case.arm, name=row.arm)))
        print(f"{place} {what}: {row.accuracy:.2f} % ({time.monotonic() - began:.0f} s)", flush=True)


def missing(case: Case, data: EvidenceData, stored: Sequence[dict[str, str]]) -> Iterator[EvidenceRow]:
    """The rows of a run that are not stored yet: a float network may be there, and its INT8 not."""
    have = {(row["arm"], row["network"], row["setting"], int(row["seed"])) for row in stored}
    for row in run(case, data):
        if (row.arm, row.network, row.setting, row.seed) not in have:
            yield row


def describe(case: Case) -> str:
    return f"{case.setting.name}, {case.network}, seed {case.seed}, {case.arm.name}"


def parser() -> argparse.ArgumentParser:
    answer = argparse.ArgumentParser(description=__doc__)
    answer.add_argument("--arms", nargs="*", choices=list(ARMS), metavar="ARM", help=f"of {'; '.join(ARMS)}")
    answer.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["six layers"])
    answer.add_argument("--setting", choices=list(SETTINGS), default=next(iter(SETTINGS)))
    answer.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    answer.add_argument("--minutes", type=float, default=60.0, help="no run begins after that")
    answer.add_argument("--data", type=Path, help="folder of Fashion-MNIST, or file of JPEG images")
    answer.add_argument("--threads", type=int, default=1, help="of each run")
    answer.add_argument("--results", type=Path, default=RESULTS)
    answer.add_argument("--dry-run", action="store_true", help="list what is to be done")
    return answer


if __name__ == "__main__":
    sys.exit(main())
