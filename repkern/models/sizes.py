"""How large the networks are, counted without making them."""

from __future__ import annotations

from typing import Any

import torch

from repkern.models.network import Network
from repkern.models.registry import create_model

__all__ = ["model_size"]


def model_size(name: str) -> dict[str, Any]:
    """name, block (the published kind), num_classes, parameters (training form) and deployed_parameters of a network.

    As `create_model(name)` and create_model(name, block="plain") make it, without memory for the weights. ValueError
    for an unknown name.
    """
    with torch.device("meta"):
        trained, plain = create_model(name), create_model(name, block="plain")
    return {
        "name": name,
        "block": trained.block,
        "num_classes": trained.config["num_classes"],
        "parameters": _parameters(trained),
        "deployed_parameters": _parameters(plain),
    }


def _parameters(model: Network) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
