"""Memory over a long training: live tensors, their bytes and resident memory, every so many steps; all must be flat.

Each figure is taken over the second half of the steps: allocators and caches fill in the first. Resident memory is
judged by the slope of a line through its samples, over the whole half, because it comes in pages.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from repkern.bench.results import Row, append_row, default_file_name, environment
from repkern.bench.rss import resident_bytes
from repkern.train.build import build_data, build_trainer
from repkern.train.callbacks import Callback
from repkern.train.recipe import Recipe

RESULTS = Path(__file__).resolve().parent / "results"
ALLOWED_MIB = 8.0  # of growth in resident memory over the second half: fragmentation, not a leak of a tensor a step


class Sample(NamedTuple):
    """What is in use after `step` steps."""

    step: int
    tensors: int
    tensor_bytes: int
    resident: int


class Watch(Callback):
    """Takes a sample every `every` steps."""

    def __init__(self, every: int) -> None:
        self.samples: list[Sample] = []
        self._every = every

    def on_step_end(self, trainer: Any) -> None:
        if trainer.step % self._every == 0:
            self.samples.append(sample(trainer.step))


def sample(step: int) -> Sample:
    """Of this process, after a collection."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return Sample(step, len(tensors), sum(storages.values()), resident_bytes())


def growth(values: Sequence[float]) -> float:
    """Of a straight line through equally spaced values, from the first to the last."""
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    slope = sum((i - middle) * (v - mean) for i, v in enumerate(values)) / sum((i - middle) ** 2 for i in range(count))
    return slope * (count - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between samples")
    parser.add_argument("--dry-run", action="store_true", help="store no row")
    args = parser.parse_args()
    watch = Watch(args.every)
    recipe = Recipe.model_validate({
        "model": {"options": {"widths": [16, 32], "blocks": 1}, "replace": {"block": "OREPAConv2d"}},
        "data": {"augment": [{"name": "affine"}], "mix": {"mixup": 0.2}},
        "train": {"epochs": 100_000, "max_steps": args.steps, "batch_size": 64, "accumulate": 2, "clip_norm": 5.0,
                  "device": "cpu", "threads": 1},
        "ema": {"decay": 0.99},
    })  # fmt: skip
    with build_trainer(recipe, build_data(recipe), callbacks=[watch]) as trainer:
        trainer.fit()
    for one in watch.samples:
        print(f"step {one.step:>6}  {one.tensors} tensors  {one.tensor_bytes} B  {one.resident / 2**20:.1f} MiB")
    late = watch.samples[len(watch.samples) // 2 :]
    same = len({(one.tensors, one.tensor_bytes) for one in late}) == 1
    grown = growth([one.resident / 2**20 for one in late])
    passed = same and grown <= ALLOWED_MIB
    print(
        f"tensors {'the same' if same else 'GROW'}, resident memory {grown:+.2f} MiB over the last {len(late)} samples"
    )
    if not args.dry_run:
        row = Row(
            kind="steady", op="digits_net", case=f"{args.steps} steps", what="resident", dtype="float32", device="cpu",
            mode="eager", backend="auto", baseline="first half", pairs=len(late), extra_mib=grown,
            limit_mib=ALLOWED_MIB, verdict="flat" if passed else "grows",
        )  # fmt: skip
        env = environment()
        append_row(RESULTS / default_file_name(env), env, row)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
