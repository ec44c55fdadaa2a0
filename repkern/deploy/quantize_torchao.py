"""What of torchao the quantization uses: imported without its noise, and its x86 quantizer set up."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["LEAST_SCALE", "WEIGHTS", "Scheme", "missing_torchao", "quiet", "torchao_module", "x86_quantizer"]

#: How weights share a scale: one for every output channel, or one for the whole kernel.
WEIGHTS = ("per_channel", "per_tensor")
_FLOW = "torchao.quantization.pt2e"
#: What torchao's own configuration for x86 has.
LEAST_SCALE = 2.0**-12
_ACTIVATIONS = (0, 255)

# Logger -> how the messages begin that say nothing about the model: kernels of other GPUs that this torch cannot load,
# and an enumeration that torch knows by itself by now.
_NOISE = {"torchao": "Failed to load ", "torch.utils._pytree": "<enum 'KernelPreference'>"}


@dataclass(frozen=True)
class Scheme:
    """How weights become integers. ValueError for what cannot be.

    weights: one of `WEIGHTS`, symmetric either way. weight_bits: 2 to 8; fewer than 8 are stored as int8 with a
    narrower range, which shows what a network can bear. Activations are 8 bits, unsigned, one scale and zero point
    for a map.
    """

    weights: str = "per_channel"
    weight_bits: int = 8

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if not isinstance(self.weight_bits, int) or not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be an integer from 2 to 8, got {self.weight_bits!r}")

    @property
    def weight_range(self) -> tuple[int, int]:
        """The least and the largest integer of a weight."""
        half = 2 ** (self.weight_bits - 1)
        return -half, half - 1


def missing_torchao() -> str | None:
    """What to tell a user without torchao; None when it is there."""
    if importlib.util.find_spec("torchao") is not None:
        return None
    return "quantization needs torchao: pip install 'repkern[quantize]'"


def torchao_module(name: str) -> Any:
    """A module of torchao's PT2E flow, such as "observer". ImportError that says how to install it."""
    problem = missing_torchao()
    if problem is not None:
        raise ImportError(problem)
    with quiet():
        return importlib.import_module(f"{_FLOW}.{name}")


def x86_quantizer(scheme: Scheme, *, qat: bool) -> Any:
    """torchao's quantizer for x86 CPUs with the weights of `scheme`."""
    x86 = torchao_module("quantizer.x86_inductor_quantizer")
    lowest, highest = scheme.weight_range
    per_channel = scheme.weights == "per_channel"
    weight = x86.QuantizationSpec(
        dtype=torch.int8,
        quant_min=lowest,
        quant_max=highest,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else None,
        is_dynamic=False,
        observer_or_fake_quant_ctr=_weight_observer(per_channel, qat),
    )
    default = x86.get_default_x86_inductor_quantization_config(is_qat=qat)
    config = x86.QuantizationConfig(default.input_activation, default.output_activation, weight, None, qat)
    return x86.X86InductorQuantizer().set_global(config)


def _weight_observer(per_channel: bool, qat: bool) -> Any:
    observers = torchao_module("observer")
    if not qat:
        observer = observers.PerChannelMinMaxObserver if per_channel else observers.MinMaxObserver
        return observer.with_args(eps=LEAST_SCALE)
    # The fused fake quantization halves the range in integers and the conversion in floats, so the two disagree about
    # the scale: a little at 8 bits, by a sixth at 3. This one asks the observer, as the conversion does.
    fake = torchao_module("fake_quantize").FakeQuantize
    moving = observers.MovingAveragePerChannelMinMaxObserver if per_channel else observers.MovingAverageMinMaxObserver
    return fake.with_args(observer=moving, eps=LEAST_SCALE)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torchao and torch say about themselves; anything else still comes through."""
    added = []
    for name, beginning in _NOISE.items():
        logger = logging.getLogger(name)

        def keep(record: logging.LogRecord, beginning: str = beginning) -> bool:
            return not record.getMessage().startswith(beginning)

        logger.addFilter(keep)
        added.append((logger, keep))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is deprecated", DeprecationWarning)
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning, r"torch\._inductor\.")
            yield
    finally:
        for logger, keep in added:
            logger.removeFilter(keep)
