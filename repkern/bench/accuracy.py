"""Logits of deployed networks under optimize_for_inference against float64, image by image, resumable."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repkern.bench import targets
from repkern.bench.deployed import calibrated, random_images
from repkern.bench.results import Row, environment
from repkern.deploy import optimize_for_inference

__all__ = ["AccuracyCase", "Finding", "accuracy_rows", "compare"]

_FIRST_IMAGE = 1000  # seeds of images start here: none of them has calibrated the norms


@dataclass(frozen=True)
class AccuracyCase:
    """A network with calibrated random weights, and how many random images it sees, `chunk` at a time."""

    model: str
    images: int = 1000
    size: int = 224
    chunk: int = 8
    width: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Finding:
    """Of one implementation on some images: squared L2 norms of the error and of the logits, the worst relative error
    of one image, and how many images keep their top-1 class.
    """

    images: int = 0
    error: float = 0.0
    norm: float = 0.0
    worst: float = 0.0
    agreeing: int = 0

    def __add__(self, other: Finding) -> Finding:
        return Finding(
            self.images + other.images,
            self.error + other.error,
            self.norm + other.norm,
            max(self.worst, other.worst),
            self.agreeing + other.agreeing,
        )

    @property
    def relative(self) -> float:
        """The relative L2 error of all logits."""
        return (self.error / self.norm) ** 0.5


def compare(
    case: AccuracyCase,
    say: Callable[[str], None],
    *,
    state: Path | None = None,
    optimize: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Finding]:
    """Findings of "repkern" and, for comparison, of "eager" float32 torch, against the same weights in float64.

    state: a file to which every finished chunk is added; chunks that it holds already are not computed again. One
    that belongs to another case or version is begun anew. optimize: default `repkern.optimize_for_inference`.
    """
    network = calibrated(case.model, size=case.size, width=case.width, seed=case.seed)
    double = copy.deepcopy(network).double()
    example = random_images(min(case.chunk, case.images), case.size, seed=_FIRST_IMAGE)
    example = example.to(memory_format=torch.channels_last)
    optimized = (optimize or optimize_for_inference)(network, example)
    found = _read(state, case)
    total: dict[str, Finding] = {"repkern": Finding(), "eager": Finding()}
    for first in range(0, case.images, case.chunk):
        if first not in found:
            count = min(case.chunk, case.images - first)
            images = random_images(count, case.size, seed=_FIRST_IMAGE + first).to(memory_format=torch.channels_last)
            found[first] = _findings({"repkern": optimized, "eager": network}, double, images)
            _append(state, case, first, found[first])
        total = {name: total[name] + finding for name, finding in found[first].items()}
        say(f"{case.model}: {', '.join(_text(name, finding) for name, finding in total.items())}")
    return total


def accuracy_rows(case: AccuracyCase, found: Mapping[str, Finding]) -> Iterator[Row]:
    """Rows of the error of all logits and of the worst image, over the bound, and of the top-1 agreement in percent.

    The targets are about the first and the last, and ours alone.
    """
    error, agreement = targets.accuracy_targets()
    for name, finding in found.items():
        row = Row(
            kind="accuracy", op="optimize_for_inference", case=f"{case.model}_{case.size}", what="logits",
            dtype="float32", device="cpu", mode="eager", backend=name, baseline="float64", pairs=finding.images,
        )  # fmt: skip
        share = 100 * finding.agreeing / finding.images
        for what, value, target in (
            ("logits", finding.relative, error), ("worst image", finding.worst, None), ("top-1", share, agreement),
        ):  # fmt: skip
            judged = target if name == "repkern" else None
            yield dataclasses.replace(
                row, what=what, ratio=share if what == "top-1" else None,
                error_over_bound=None if what == "top-1" else value / error.value, target=str(judged or ""),
                verdict=targets.verdict(judged, value),
            )  # fmt: skip


@torch.inference_mode()
def _findings(
    networks: Mapping[str, Callable[[Tensor], Tensor]], double: nn.Module, images: Tensor
) -> dict[str, Finding]:
    exact = torch.cat([double(image[None].double()) for image in images])
    norms = exact.square().sum(1)
    answer = {}
    for name, network in networks.items():
        logits = network(images).double()
        errors = (logits - exact).square().sum(1)
        answer[name] = Finding(
            len(images),
            float(errors.sum()),
            float(norms.sum()),
            float((errors / norms).sqrt().max()),
            int((logits.argmax(1) == exact.argmax(1)).sum()),
        )
    return answer


def _text(name: str, finding: Finding) -> str:
    error = f"error {finding.relative:.2e}, of an image {finding.worst:.2e}"
    return f"{name} {finding.agreeing}/{finding.images} top-1, {error}"


def _header(case: AccuracyCase) -> str:
    """What findings must have in common to be added up; the number of images may grow."""
    own = {name: value for name, value in dataclasses.asdict(case).items() if name != "images"}
    env = environment()
    return json.dumps(own | {"commit": env.commit, "torch": env.torch, "threads": env.threads, "isa": env.isa})


def _read(state: Path | None, case: AccuracyCase) -> dict[int, dict[str, Finding]]:
    """Finished chunks by their first image. Lines that another case wrote, or that were cut off, leave the file."""
    if state is None or not state.exists():
        return {}
    header, *lines = [line for line in state.read_text().splitlines(keepends=True) if line.endswith("\n")] or [""]
    if header.strip() != _header(case):
        state.unlink()
        return {}
    state.write_text("".join([header, *lines]))
    found = {}
    for entry in map(json.loads, lines):
        if entry["images"] == min(case.chunk, case.images - entry["first"]):
            found[entry["first"]] = {name: Finding(**values) for name, values in entry["found"].items()}
    return found


def _append(state: Path | None, case: AccuracyCase, first: int, found: Mapping[str, Finding]) -> None:
    if state is None:
        return
    state.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        "first": first,
        "images": next(iter(found.values())).images,
        "found": {name: dataclasses.asdict(finding) for name, finding in found.items()},
    }
    with state.open("a") as file:
        if file.tell() == 0:
            file.write(_header(case) + "\n")
        file.write(json.dumps(entry) + "\n")
