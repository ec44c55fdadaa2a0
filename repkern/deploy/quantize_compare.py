"""compare_quantized: how much several trained networks lose in INT8, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repkern.deploy.quantize import evaluate, finish_ptq, observe
from repkern.deploy.quantize_report import SensitivityReport, sensitivity_of, sqnr
from repkern.deploy.quantize_torchao import Scheme

__all__ = ["Loss", "compare_quantized"]


@dataclass(frozen=True)
class Loss:
    """One network before and after quantization. sqnr: of the logits of all test images, in decibel.

    disagree: share of the test images whose predicted class is another one.
    """

    float_accuracy: float
    accuracy: float
    sqnr: float
    disagree: float

    def as_json(self) -> dict[str, float]:
        """As JSON values."""
        return asdict(self)


def compare_quantized(
    models: Mapping[str, nn.Module],
    calibration: list[Tensor],
    test: tuple[Tensor, Tensor],
    *,
    schemes: Mapping[str, Mapping[str, Any]],
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, dict[str, Loss]], dict[str, SensitivityReport]]:
    """Scheme -> network -> `Loss`, and network -> its sensitivity under the first scheme.

    models: in eval mode, on any device. calibration: batches as `quantize` takes them. test: images and labels.
    schemes: name -> options of `quantize`. say: receives the name of each network.
    """
    images, labels = (tensor.cpu() for tensor in test)
    losses: dict[str, dict[str, Loss]] = {scheme: {} for scheme in schemes}
    reports: dict[str, SensitivityReport] = {}
    first = next(iter(schemes.values()))
    for name, model in models.items():
        say(name)
        device = next(model.parameters()).device
        with torch.no_grad():
            wanted = model(images.to(device)).cpu()
        before = float((wanted.argmax(1) == labels).double().mean())
        for scheme, options in schemes.items():
            chosen = Scheme(**options)
            graph, seen = observe(model, calibration, chosen)
            if options is first:
                reports[name] = sensitivity_of(graph, calibration[-1], chosen)
            network = finish_ptq(graph, seen, chosen)
            found = network(images)
            losses[scheme][name] = Loss(
                float_accuracy=before,
                accuracy=evaluate(network, [(images, labels)])["accuracy"],
                sqnr=sqnr(wanted, found),
                disagree=float((found.argmax(1) != wanted.argmax(1)).double().mean()),
            )
    return losses, reports
