"""What every fuzzer here shares: numbered cases in worker processes, so that a crash or a hang is one case's outcome.

A fuzzer is a script with a function `case(rng) -> str` that makes one random call and says how it ended. It may raise
ValueError, TypeError, or RuntimeError with a text; anything else, AssertionError included, is a failure. Then
`if __name__ == "__main__": sys.exit(harness.main(__file__, case))` gives it

    python python_tests/fuzz/ops.py --calls 100000 --seed 1 [--workers 2]     a run; fails where a case failed
    python python_tests/fuzz/ops.py --seed 1 --case 4711                      one case again, in this process

Case i of seed s draws from random.Random(f"{s}:{i}") and from torch seeded by it: it needs none of those before.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import selectors
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

# A crash is noticed at once; this is for what never ends. No statement about speed.
HANG_SECONDS = 120
# What a worker may allocate beyond its start, so that absurd sizes fail as on a small machine.
_MEMORY = 1 << 30
# Texts of RuntimeErrors that say nothing to a user.
_UNCLEAR = ("INTERNAL ASSERT", "vector::", "bad_alloc", "unordered_map", "Cannot access data pointer")


@dataclass
class Report:
    """How many cases ended how, and those that must not end so, as `seed:case outcome`."""

    outcomes: collections.Counter = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return sum(self.outcomes.values())

    def add(self, case: str, outcome: str, detail: str = "") -> None:
        self.outcomes[outcome] += 1
        if outcome.startswith("FAILED"):
            self.failures.append(f"{case} {outcome} {detail}".strip())

    def __str__(self) -> str:
        lines = [f"{self.calls} calls, {len(self.failures)} failures"]
        lines += [f"{count:8d}  {name}" for name, count in self.outcomes.most_common()]
        return "\n".join([*lines, *self.failures])


def run_case(case, seed: int, number: int) -> tuple[str, str]:
    """(outcome, detail) of one case."""
    rng = random.Random(f"{seed}:{number}")
    torch.manual_seed(rng.getrandbits(48))
    try:
        return case(rng), ""
    except (ValueError, TypeError) as error:
        text = str(error)
        return (f"refused {type(error).__name__}", "") if text else ("FAILED empty text", repr(error))
    except RuntimeError as error:
        text = str(error)
        unclear = not text or any(words in text for words in _UNCLEAR) or isinstance(error, RecursionError)
        return ("FAILED unclear", repr(error)[:400]) if unclear else ("refused RuntimeError", "")
    except AssertionError as error:
        return "FAILED wrong", str(error)[:600]
    except Exception as error:
        return f"FAILED {type(error).__name__}", "".join(traceback.format_exception(error)[-3:])[:800]


def _work(case, seed: int, numbers: range) -> None:
    """Announce each case before it runs, tell its outcome after, a line of JSON each."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print stays out of the protocol
    for number in numbers:
        print(json.dumps([number]), file=out, flush=True)
        print(json.dumps([number, *run_case(case, seed, number)]), file=out, flush=True)


class _Worker:
    """A process that does its numbers; where it dies, another goes on behind the case that killed it."""

    def __init__(self, script: str, seed: int, numbers: range, arguments: list[str]) -> None:
        self.script, self.seed, self.left, self.arguments = script, seed, numbers, arguments
        self.current: int | None = None
        self.start()

    def start(self) -> None:
        span = f"{self.left.start}:{self.left.stop}:{self.left.step}"
        command = [sys.executable, self.script, "--seed", str(self.seed), "--work", span, *self.arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.heard = time.monotonic()
        self.buffer = b""

    def read(self, report: Report) -> None:
        """What the process has to say; at its end, the case that it died of."""
        data = os.read(self.process.stdout.fileno(), 65536)
        self.heard = time.monotonic()
        if not data:
            self.process.wait()
            self.end(report, f"FAILED died with {self.process.returncode}")
            return
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            number, *outcome = json.loads(line)
            self.current = None if outcome else number
            if outcome:
                report.add(f"{self.seed}:{number}", *outcome)
                self.left = range(number + self.left.step, self.left.stop, self.left.step)

    def end(self, report: Report, outcome: str) -> None:
        if self.current is None and self.left:
            raise RuntimeError(f"a worker ended outside any case, exit status {self.process.returncode}")
        if self.current is not None:
            report.add(f"{self.seed}:{self.current}", outcome)
            self.left = range(self.current + self.left.step, self.left.stop, self.left.step)
            self.current = None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def run(script: str, calls: int, seed: int, workers: int = 2, arguments: tuple[str, ...] = ()) -> Report:
    """`calls` cases of the script's fuzzer; arguments: further ones of its own command line."""
    report = Report()
    selector = selectors.DefaultSelector()
    for first in range(min(workers, calls)):
        worker = _Worker(script, seed, range(first, calls, workers), list(arguments))
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
    while selector.get_map():
        for key, _ in selector.select(timeout=1):
            key.data.read(report)
        for key in list(selector.get_map().values()):
            worker = key.data
            hangs = time.monotonic() - worker.heard > HANG_SECONDS
            if not hangs and worker.process.returncode is None:
                continue
            selector.unregister(key.fileobj)
            worker.stop()
            if hangs:
                worker.end(report, "FAILED hangs")
            if worker.left:
                worker.start()
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
    return report


def main(script: str, case) -> int:
    """The command line of a fuzzer; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", type=int, help="run this case alone, here")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.work:
        _work(case, options.seed, range(*map(int, options.work.split(":"))))
        return 0
    if options.case is not None:
        rng = random.Random(f"{options.seed}:{options.case}")
        torch.manual_seed(rng.getrandbits(48))
        print(case(rng))
        return 0
    report = run(script, options.calls, options.seed, options.workers)
    print(report)
    return 1 if report.failures else 0
