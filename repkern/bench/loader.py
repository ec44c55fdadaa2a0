"""`repkern bench loader`: does reading images keep up with training?

A training step on images that are decoded and augmented, against the same step on a batch in memory; reading alone,
against the model; and how decoding of larger JPEG files grows from one worker process to two.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn import functional

from repkern.bench import targets
from repkern.bench.results import Row
from repkern.bench.timing import Workload, measure_pairs, quantiles, ratio_of_pairs, settle_allocator
from repkern.data import Batch, DataRecipe, ImageSource, open_data
from repkern.models import create_model

__all__ = ["LoaderOptions", "run_loader", "write_photos"]

_KINDS_OF_PHOTOS = 64  # different files; more would only fill the disk
_TEST_PHOTOS = 2


@dataclass(frozen=True)
class LoaderOptions:
    """What to measure and how long. Images of a step are `size` wide, those that are only decoded `large`."""

    model: str = "vgg16_cifar"
    batch: int = 128
    size: int = 32
    steps: int = 4
    workers: tuple[int, ...] = (0, 1)
    large: int = 224
    large_batch: int = 32
    large_batches: int = 12
    pairs: int = 7
    width: float = 1.0
    suffix: str = ""

    @property
    def case(self) -> str:
        """The name of the training step in rows."""
        return f"{self.model}_b{self.batch}_{self.size}{self.suffix}"


def run_loader(options: LoaderOptions, on_row: Callable[[Row], None], say: Callable[[str], None]) -> list[str]:
    """Hand every row to `on_row` as soon as it is measured; return the failed checks in words."""
    settle_allocator()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        say(f"writing images of {options.size} x {options.size} and of 500 x 375 pixels")
        write_photos(small, options.batch * options.steps, (options.size, options.size))
        write_photos(large, options.large_batch * options.large_batches, (500, 375))
        failures = _measure_steps(options, small, on_row, say)
        return failures + _measure_decoding(options, large, on_row, say)


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """An image folder of `count` JPEG files to train on, in two classes.

    Noise at every scale, weaker the finer it is, as in photographs: plain noise would be dearer to decode.
    """
    from PIL import Image

    random = numpy.random.default_rng(0)
    files = []
    for number in range(min(count, _KINDS_OF_PHOTOS)):
        total = numpy.zeros((size[1], size[0], 3))
        side = 4
        while side <= max(size):
            noise = random.integers(0, 256, (side, side, 3)).astype(numpy.uint8)
            total += (numpy.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)) - 127.5) * 4 / side
            side *= 2
        path = folder / f"{number}.jpg"
        folder.mkdir(exist_ok=True)
        Image.fromarray((total + 127.5).clip(0, 255).astype(numpy.uint8)).save(path, quality=90)
        files.append(path.read_bytes())
        path.unlink()
    for part, many in (("train", count), ("test", 2 * _TEST_PHOTOS)):
        for number in range(many):
            place = folder / part / f"class {number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.jpg").write_bytes(files[number % len(files)])


class _Training:
    """A network, its optimizer, and a batch that stays in memory."""

    def __init__(self, options: LoaderOptions, batch: Batch) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = create_model(options.model, num_classes=2, block="plain", width=options.width).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
        self.batch, self.steps = batch, options.steps

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(self.model(batch.images), batch.labels).backward()
        self.optimizer.step()

    def in_memory(self, _: Any) -> None:
        for _ in range(self.steps):
            self.step(self.batch)

    def read(self, source: ImageSource) -> Callable[[Any], None]:
        """Steps over whole epochs, so that nothing is read ahead while something else is timed."""

        def run(epoch: int) -> None:
            for batch in source.train_batches(epoch):
                self.step(batch)

        return run


@contextmanager
def _opened(folder: Path, size: int, batch: int, workers: int, **options: Any) -> Iterator[ImageSource]:
    recipe = DataRecipe(name="folder", root=str(folder), image_size=size, memory=0.0, workers=workers, **options)
    source = open_data(recipe, batch_size=batch, seed=0)
    try:
        yield source
    finally:
        source.close()


def _epochs() -> Callable[[], int]:
    numbers = iter(range(2**31))
    return lambda: next(numbers)


def _only_reads(source: ImageSource) -> Callable[[int], None]:
    def run(epoch: int) -> None:
        for _ in source.train_batches(epoch):
            pass

    return run


def _differing(folder: Path, size: int, batch: int, workers: Sequence[int], **options: Any) -> list[str]:
    """Worker counts whose first batch is not, to the bit, that of this process."""
    found = {}
    for count in {0, *workers}:
        with _opened(folder, size, batch, count, **options) as source:
            found[count] = next(source.train_batches(0)).images
    wrong = [count for count in workers if not torch.equal(found[count], found[0])]
    return [f"{size} x {size}: {count} workers give other images than none" for count in wrong]


def _measure_steps(
    options: LoaderOptions, folder: Path, on_row: Callable[[Row], None], say: Callable[[str], None]
) -> list[str]:
    augment: dict[str, Any] = {"augment": ({"name": "flip"}, {"name": "crop", "padding": 4})}
    failures = _differing(folder, options.size, options.batch, options.workers, **augment)
    if failures:
        return failures
    with _opened(folder, options.size, options.batch, 0, **augment) as source:
        training = _Training(options, next(source.train_batches(0)))
    for workers in options.workers:
        with _opened(folder, options.size, options.batch, workers, **augment) as source:
            works = {
                "step": Workload(training.read(source), prepare=_epochs()),
                "memory": Workload(training.in_memory),
                "reading": Workload(_only_reads(source), prepare=_epochs()),
            }
            samples = measure_pairs(works, pairs=options.pairs)
        each = {name: [seconds / options.steps for seconds in values] for name, values in samples.items()}
        step, memory, reading = (quantiles(each[name]).p50 for name in works)
        say(
            f"  {workers} workers: the model takes {options.batch / memory:,.0f} images/s in memory and "
            f"{options.batch / step:,.0f} while they are read; reading alone gives {options.batch / reading:,.0f}"
        )
        target = targets.loader_target("step")
        on_row(_row(options.case, "step", workers, "in memory", each["step"], each["memory"], target, inverse=True))
        on_row(_row(options.case, "reading", workers, "model", each["reading"], each["memory"], None))
    return []


def _measure_decoding(
    options: LoaderOptions, folder: Path, on_row: Callable[[Row], None], say: Callable[[str], None]
) -> list[str]:
    crops: dict[str, Any] = {"crop_scale": (0.08, 1.0), "augment": ({"name": "flip"},)}
    failures = _differing(folder, options.large, options.large_batch, (1, 2), **crops)
    if failures:
        return failures
    with (
        _opened(folder, options.large, options.large_batch, 1, **crops) as one,
        _opened(folder, options.large, options.large_batch, 2, **crops) as two,
    ):
        works = {name: Workload(_only_reads(source), prepare=_epochs()) for name, source in (("1", one), ("2", two))}
        samples = measure_pairs(works, pairs=options.pairs)
    count = options.large_batch * options.large_batches
    each = {name: [seconds / count for seconds in values] for name, values in samples.items()}
    alone, both = (1 / quantiles(each[name]).p50 for name in works)
    say(f"  decoding crops to {options.large}: {alone:,.0f} images/s with one worker, {both:,.0f} with two")
    target = targets.loader_target("decoding")
    on_row(_row(f"jpeg_{options.large}{options.suffix}", "decoding", 2, "1 worker", each["2"], each["1"], target))
    return []


def _row(
    case: str, what: str, workers: int, baseline: str, ours: list[float], other: list[float],
    target: targets.Target | None, *, inverse: bool = False,
) -> Row:  # fmt: skip
    """Times of a step, or of an image. `inverse`: the ratio says how much longer ours takes, not how much faster."""
    p20, p50, p80 = (1e3 * value for value in quantiles(ours))
    ratio = ratio_of_pairs(ours, other) if inverse else ratio_of_pairs(other, ours)
    return Row(
        kind="loader", op="loader", case=case, what=what, dtype="float32", device="cpu", mode="eager",
        backend=f"{workers} workers", ms_p20=p20, ms=p50, ms_p80=p80, baseline=baseline,
        baseline_ms=1e3 * quantiles(other).p50, ratio_p20=ratio.p20, ratio=ratio.p50, ratio_p80=ratio.p80,
        pairs=len(ours), target=str(target or ""), verdict=targets.verdict(target, ratio.p50),
    )  # fmt: skip
