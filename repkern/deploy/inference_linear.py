"""InferenceLinear: a linear layer and its activation in one call, by the method that was fastest here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repkern.deploy._methods import ConvSpec, activate
from repkern.deploy.inference_conv import InferenceConv2d

__all__ = ["InferenceLinear"]


class InferenceLinear(InferenceConv2d):
    """activation(linear(x, weight, bias)) for inference: a 1x1 convolution of maps of one pixel.

    With few rows torch reads the weights with one thread. x [N, C]; other inputs run as torch's. The state_dict is
    nn.Linear's: weight [K, C] and bias.
    """

    def __init__(self, linear: nn.Linear, activation: str, precision: str) -> None:
        spec = ConvSpec(
            linear.in_features, linear.out_features, (1, 1), activation=activation, precision=precision, linear=True
        )
        super().__init__(spec, linear.weight[:, :, None, None], linear.bias)

    @property
    def weight(self) -> Tensor:
        """[K, C]; a copy where the layer keeps another form."""
        return self.kernel().flatten(1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C] -> [N, K]."""
        if isinstance(x, Tensor) and x.dim() != 2:
            return activate(self.spec.activation, functional.linear(x, self.weight, self.bias), residual)
        rows = x[:, :, None, None] if isinstance(x, Tensor) else x
        return super().forward(rows, residual).flatten(1)

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        key = f"{prefix}weight"
        weight = state_dict.get(key)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            state_dict = {**state_dict, key: weight[:, :, None, None]}
        super()._load_from_state_dict(state_dict, prefix, *more)
