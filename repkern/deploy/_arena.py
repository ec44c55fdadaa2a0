"""The packed weights of all layers in one piece of memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from repkern.deploy.inference_conv import InferenceConv2d
from repkern.ops._huge_pages import HUGE_PAGE, advise

__all__ = ["gather_weights"]

_LINE = 64


def gather_weights(layers: Iterable[InferenceConv2d]) -> None:
    """Move packed weights on the CPU side by side into large pages: at batch 1 a network streams its weights."""
    found = [(layer, layer.packed) for layer in layers]
    packed = [(layer, tensor) for layer, tensor in found if tensor is not None and tensor.device.type == "cpu"]
    sizes = [-(-tensor.nbytes // _LINE) * _LINE for _, tensor in packed]
    if sum(sizes) < HUGE_PAGE:
        return
    raw = torch.empty(sum(sizes) + HUGE_PAGE, dtype=torch.uint8)
    advise(raw.data_ptr(), raw.nbytes)
    at = -raw.data_ptr() % HUGE_PAGE
    for (layer, tensor), size in zip(packed, sizes, strict=True):
        place = raw[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        layer.hold_packed(place.copy_(tensor))
        at += size
