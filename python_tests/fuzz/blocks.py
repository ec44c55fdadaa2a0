"""Fuzzer of block constructions: `python python_tests/fuzz/blocks.py --blocks 50000 --seed 1`.

Every construction raises ValueError or TypeError, or gives a block whose deployed form computes what it computes in
eval mode, and whose parameters all get finite gradients. Constructions run in a process of their own with a limit on
its memory, first on the meta device, so that absurd sizes are seen and not allocated; a construction that crashes that
process or takes too long is a failure like a wrong value, and the next process goes on behind it.
"""

import argparse
import collections
import copy
import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from block_arguments import arguments

from repkern import reparameterize

SECONDS = 30  # of the processor for one construction; ordinary ones take milliseconds
MOST_ELEMENTS = 1 << 20  # of a block that is really made, and of the maps it is run on
MEMORY = 6 << 30
EQUAL = 1e-10


class Wrong(Exception):
    """A block that does not keep what is promised."""


class Slow(BaseException):
    """A construction that does not end; nothing on the way may catch it."""


def randomize(block):
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            for parameter in module.parameters(recurse=False):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return block


def output_of(module, x):
    """(output, None) or (None, error)."""
    try:
        return module(x), None
    except (ValueError, RuntimeError) as problem:
        return None, problem


def check_gradients(block, out):
    out.square().sum().backward()
    for name, parameter in block.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not torch.isfinite(parameter.grad).all()):
            raise Wrong(f"gradient of {name}: {parameter.grad}")


def check_block(block, channels):
    """What was run: "computed", or "refused input" where the block and its deployed form both refuse the input."""
    randomize(block).eval()
    plain = reparameterize(copy.deepcopy(block))
    x = torch.randn(2, channels, 9, 11, dtype=torch.float64)
    try:
        size = copy.deepcopy(plain).to("meta")(x.to("meta")).numel()
    except (ValueError, RuntimeError):
        size = 0
    if size > MOST_ELEMENTS:
        return "too large to run"
    (out, problem), (wanted, other) = output_of(block, x), output_of(plain, x)
    if (problem is None) != (other is None):
        raise Wrong(f"block: {problem!r}; deployed: {other!r}")
    if problem is not None:
        return "refused input"
    if out.shape != wanted.shape:
        raise Wrong(f"shape {tuple(out.shape)} becomes {tuple(wanted.shape)}")
    if asked_for_nonfinite(block):
        return "not finite, as asked"
    difference, largest = float((out - wanted).abs().max()), float(wanted.abs().max())
    if not difference <= EQUAL * max(largest, 1):
        raise Wrong(f"deployed form differs by {difference:.3g}, the largest value is {largest:.3g}")
    check_gradients(block, out)
    return "computed"


def asked_for_nonfinite(block):
    """Whether the user's own numbers (initial scales) are not finite or so large that sums of squares are not."""
    return any(not parameter.square().sum().isfinite() for parameter in block.parameters())


def one(kind, given):
    """What became of a construction; Wrong or another error for a failure."""
    try:
        on_meta = kind(**{**given, "device": "meta"} if given.get("device") is None else given)
        elements = sum(tensor.numel() for tensor in (*on_meta.parameters(), *on_meta.buffers()))
    except (ValueError, TypeError) as problem:
        if not str(problem):
            raise Wrong("an error without a message") from problem
        return "refused"
    except RuntimeError as problem:
        return refused_by_torch(given, problem)
    if elements > MOST_ELEMENTS:
        return "too large to make"
    try:
        block = kind(**given)
    except (ValueError, TypeError):
        return "refused"
    return check_block(block, getattr(block, "in_channels", None) or first_channels(block))


def refused_by_torch(given, problem):
    """Errors of torch's own that are clear enough; others are raised again."""
    if given.get("device") is not None:
        return "refused the device"
    if "overflow" in str(problem):  # a tensor beyond 2**63 bytes
        return "refused as too large by torch"
    if any(isinstance(value, torch.Tensor) and value.dim() for value in given.values()) and "Tensor" in str(problem):
        return "refused"  # the truth value of a tensor of several values, and the like
    raise problem


def first_channels(block):
    return next(module.in_channels for module in block.modules() if hasattr(module, "in_channels"))


def too_slow(*_):
    raise Slow(f"took more than {SECONDS} s")


def allow(seconds):
    """Raise Slow after that much of the processor's time, and end the process where native code keeps it from that."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 2 * seconds + 1, resource.RLIM_INFINITY))


def work(seed, start, stop):
    """Constructions `start` to `stop`, one JSON line before and after each."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, too_slow)
    for number in range(start, stop):
        kind, given = arguments(random.Random(f"{seed} {number}"))
        shown = f"{kind.__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
        torch.manual_seed(number)
        print(json.dumps({"begin": number, "call": shown}), flush=True)
        allow(SECONDS)
        try:
            outcome, detail = one(kind, given), ""
        except (Exception, Slow) as problem:
            outcome, detail = "FAILED", f"{type(problem).__name__}: {problem}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(
            json.dumps({"end": number, "kind": kind.__name__, "outcome": outcome, "detail": detail[:300]}), flush=True
        )
        if detail.startswith("Slow"):
            return  # it was interrupted anywhere, so the next ones run in a fresh process


def run(blocks, seed, piece=5000):
    """(totals by outcome, failures) of constructions 0 to `blocks`."""
    totals, failures, number = collections.Counter(), [], 0
    while number < blocks:
        stop = min(number + piece, blocks)
        words = [sys.executable, __file__, "--seed", str(seed), "--work", str(number), str(stop)]
        worker = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        call = "importing"
        for line in worker.stdout:
            event = json.loads(line)
            call = event.get("call", call)
            if "end" in event:
                number = event["end"] + 1
                totals[event["outcome"]] += 1
                if event["outcome"] == "FAILED":
                    failures.append(f"{call}: {event['detail']}")
        if worker.wait() != 0:
            totals["FAILED"] += 1
            failures.append(f"{call}: the process ended with {worker.returncode}")
            number += 1
    return totals, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.seed, *options.work)
        return 0
    totals, failures = run(options.blocks, options.seed)
    for failure in failures:
        print(failure)
    print(f"{options.blocks} constructions, seed {options.seed}: " + ", ".join(f"{n} {k}" for k, n in totals.items()))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
