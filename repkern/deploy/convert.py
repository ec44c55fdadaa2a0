"""A checkpoint file in training form -> one in deployed form, proven to compute the same."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repkern.deploy.opening import open_model
from repkern.models import Network, save
from repkern.models.saving import SUFFIXES
from repkern.nn import ReparameterizeReport, reparameterize

__all__ = ["Conversion", "images_for", "quiet_about_conversion", "reparameterize_file"]


@dataclass
class Conversion:
    """What `reparameterize_file` did. parameters, size_bytes: before and after."""

    source: str
    destination: str
    model: str
    block: str
    layouts: list[str]
    image_size: int | None
    batch: int
    parameters: tuple[int, int]
    size_bytes: tuple[int, int]
    report: ReparameterizeReport

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        values = {name: value for name, value in vars(self).items() if name != "report"}
        return values | {"report": self.report.as_json()}


def reparameterize_file(
    source: str | Path,
    destination: str | Path,
    *,
    model: str | None = None,
    block: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = 64,
    batch: int = 2,
    say: Callable[[str], None] = lambda step: None,
) -> Conversion:
    """Reparameterize the network of one file into another, a .safetensors or .pth of `repkern.models.save`.

    source, model, block, num_classes: as `open_model`. image_size, batch: of the random images on which both forms
    are compared (None: they are not); ValueError beyond the bound of `reparameterize`, and nothing is written then.
    say: called with the name of each step. What `reparameterize` warns about is in the report, not warned about.
    """
    destination = Path(destination)
    if destination.suffix not in SUFFIXES:
        raise ValueError(f"the file to write must end in {' or '.join(SUFFIXES)}, got {destination.name!r}")
    say(f"reading {source}")
    opened = open_model(source, model=model, block=block, num_classes=num_classes)
    network, report = opened.model, ReparameterizeReport()
    images = None if image_size is None else images_for(network, batch, image_size)
    say("converting" if images is None else "converting, and comparing in float32 and float64")
    with quiet_about_conversion():
        plain = reparameterize(network, verify=images, report=report)
    say(f"writing {destination}")
    size = Path(source).stat().st_size  # before writing: the two may be one file
    save(plain, destination)
    return Conversion(
        source=str(source),
        destination=str(destination),
        model=network.model_name,
        block=network.block,
        layouts=opened.layouts,
        image_size=image_size,
        batch=batch,
        parameters=(_parameters(network), _parameters(plain)),
        size_bytes=(size, destination.stat().st_size),
        report=report,
    )


def images_for(network: Network, batch: int, size: int) -> Tensor:
    """Normal noise [batch, in_chans, size, size] in the network's dtype, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, network.config["in_chans"], size, size, generator=generator)
    return images.to(next(network.parameters()).dtype)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def quiet_about_conversion() -> Iterator[None]:
    """A context in which `reparameterize` does not warn; its report has the texts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "reparameterize: ", UserWarning)
        yield
