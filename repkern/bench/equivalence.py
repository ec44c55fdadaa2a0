"""Training form against deployed form of every listed network, in float64 and float32, at full width."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from repkern.bench.results import Row
from repkern.models import create_model, default_block, list_models
from repkern.models.network import Network
from repkern.nn.reparameterize import reparameterize

__all__ = ["BOUNDS", "PUBLISHED", "EquivalenceCase", "equivalence_cases", "run_equivalence"]

#: Largest difference allowed, relative to the largest output.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}

#: The kinds of blocks that networks were published with, beyond their own, by name pattern.
PUBLISHED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("repvgg_a*", ("orepa_vgg", "odbb", "dyrep")),
    ("repvgg_b*", ("odbb", "dyrep")),
    ("repvgg_b0", ("acb",)),
    ("repopt_vgg_*", ("csla", "repvgg")),
    ("resnet*", ("repvgg", "acb", "dbb", "dyrep", "orepa")),
    ("resnext*", ("repvgg", "acb", "dbb", "orepa")),
    ("wide_resnet*", ("repvgg", "acb", "dbb", "orepa")),
    ("vgg16_cifar", ("acb", "dbb", "odbb", "dyrep")),
    ("mobilenet_v1", ("acb", "dbb", "dyrep")),
    ("repghostnet_*", ("conv_bn",)),
)
_SIZE = 64

EquivalenceCase = tuple[str, str]


def equivalence_cases(pattern: str = "*") -> list[EquivalenceCase]:
    """(model, block) for every listed model that matches and every kind of block it was published with."""
    cases = []
    for name in list_models(pattern):
        kinds = [default_block(name)]
        for published, more in PUBLISHED:
            if fnmatch.fnmatch(name, published):
                kinds += more
        cases += [(name, kind) for kind in dict.fromkeys(kinds)]
    return cases


def run_equivalence(
    cases: Sequence[EquivalenceCase],
    on_row: Callable[[Row], None],
    say: Callable[[str], None],
    *,
    size: int = _SIZE,
    width: float = 1.0,
) -> list[str]:
    """Compare every case and hand its two rows to `on_row`; return the cases beyond the bound, in words.

    One random image of `size` x `size`; norms have random statistics, scales and shifts. The difference is the larger
    one of the last feature map and the logits, each relative to its largest value.
    """
    failures = []
    for number, (name, kind) in enumerate(cases, 1):
        model = _randomized(create_model(name, block=kind, width=width))
        for dtype, bound in BOUNDS.items():
            difference = _difference(model.to(dtype), size)
            precision = str(dtype).removeprefix("torch.")
            verdict = "ok" if difference <= bound else "short"
            on_row(_row(name, kind, precision, difference, bound, verdict))
            say(f"[{number}/{len(cases)}] {name} {kind} {precision}: {difference:.2g} of the largest value, {verdict}")
            if verdict != "ok":
                failures.append(f"{name} {kind} {precision}: {difference:.3g} exceeds {bound:.0e}")
    return failures


def _row(name: str, kind: str, precision: str, difference: float, bound: float, verdict: str) -> Row:
    return Row(
        kind="equivalence",
        op=name,
        case=kind,
        what="forward",
        dtype=precision,
        device="cpu",
        mode="eager",
        backend="auto",
        baseline="deployed",
        error_over_bound=difference / bound,
        verdict=verdict,
    )


@torch.no_grad()
def _randomized(model: Network) -> Network:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.2, generator=generator)
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.fill_(1)
    model.double().eval()
    return model


@torch.no_grad()
def _difference(model: Network, size: int) -> float:
    deployed = cast(Network, reparameterize(model))
    dtype = next(model.parameters()).dtype
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    ours, plain = model.forward_features(x), deployed.forward_features(x)
    logits = model.forward_head(ours), deployed.forward_head(plain)
    return max(_relative(plain, ours), _relative(logits[1], logits[0]))


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
