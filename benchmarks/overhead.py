"""What a training step costs in the engine beyond a bare loop: ResNet-18 on 32x32 images, in pairs A B A B.

Both train a fresh network on the same batches, which are in memory. The bare loop does no more than PyTorch's tutorial:
zero_grad, forward, loss, backward, step. The engine does what it does by default: metrics, a check of the loss, a copy
of the statistics of norms, deterministic algorithms, the schedule, and at the end of each sample the row of an epoch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repkern.bench.resnet import ResNet18
from repkern.bench.results import Row, append_row, default_file_name, environment
from repkern.bench.timing import Workload, measure_pairs, quantiles, ratio_of_pairs, settle_allocator
from repkern.data.batch import Batch, Shard
from repkern.train.recipe import TrainingRecipe
from repkern.train.trainer import Trainer

RESULTS = Path(__file__).resolve().parent / "results"
MOST = 1.02


class Batches:
    """`steps` times the same batch; nothing to test on."""

    channels, image_size = 3, 32

    def __init__(self, batch_size: int, steps: int, classes: int = 10) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch_size, 3, 32, 32, generator=generator)
        self.batch = Batch(images, torch.randint(0, classes, (batch_size,), generator=generator))
        self.classes = tuple(map(str, range(classes)))
        self.batch_size, self.steps_per_epoch = batch_size, steps

    def train_batches(self, epoch: int, first_step: int = 0, shard: Shard | None = None) -> Iterator[Batch]:
        for _ in range(first_step, self.steps_per_epoch):
            yield self.batch

    def test_batches(self, shard: Shard | None = None) -> Iterator[Batch]:
        return iter(())

    def describe(self) -> dict[str, Any]:
        return {}


def make_trainer(data: Batches) -> Trainer:
    """With the defaults of a recipe."""
    torch.manual_seed(0)
    recipe = TrainingRecipe.model_validate(
        {"train": {"epochs": 1, "batch_size": data.batch_size, "device": "cpu", "threads": torch.get_num_threads()}}
    )
    return Trainer(ResNet18(10), data, recipe)


def make_bare(data: Batches) -> tuple[nn.Module, torch.optim.Optimizer, Batches]:
    """The same network and optimizer."""
    torch.manual_seed(0)
    model = ResNet18(10).train()
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4), data


def bare_loop(made: tuple[nn.Module, torch.optim.Optimizer, Batches]) -> None:
    """One epoch."""
    model, optimizer, data = made
    for images, labels in data.train_batches(0):
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of a sample")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="store no row")
    args = parser.parse_args()
    data = Batches(args.batch_size, args.steps)
    settle_allocator()
    times = measure_pairs(
        {
            "bare": Workload(bare_loop, lambda: make_bare(data)),
            "engine": Workload(lambda trainer: trainer.fit(), lambda: make_trainer(data)),
        },
        pairs=args.pairs,
    )
    ours, bare = (quantiles([1e3 * s / args.steps for s in times[name]]) for name in ("engine", "bare"))
    ratio = ratio_of_pairs(times["bare"], times["engine"])
    passed = ratio.p50 >= 1 / MOST
    print(
        f"bare {bare.p50:.2f} ms a step, engine {ours.p50:.2f} ms, overhead {100 * (1 / ratio.p50 - 1):+.2f} % (median)"
    )
    if not args.dry_run:
        env = environment()
        row = Row(
            kind="overhead", op="resnet18", case=f"b{args.batch_size} 32x32", what="step", dtype="float32",
            device="cpu", mode="eager", backend="auto", ms_p20=ours.p20, ms=ours.p50, ms_p80=ours.p80,
            baseline="bare loop", baseline_ms=bare.p50, ratio_p20=ratio.p20, ratio=ratio.p50, ratio_p80=ratio.p80,
            pairs=args.pairs, verdict="at most 2 %" if passed else "more than 2 %",
        )  # fmt: skip
        append_row(RESULTS / default_file_name(env), env, row)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
