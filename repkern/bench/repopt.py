"""`repkern bench repopt`: a training step of a plain network with RepSGD against the same network with branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from repkern.bench import targets
from repkern.bench.optim import grad_mults_of
from repkern.bench.plain_blocks import plain_form
from repkern.bench.results import Row
from repkern.bench.timing import (
    Workload,
    measure_pairs,
    quantiles,
    ratio_of_pairs,
    settle_allocator,
    strict_fp32,
)
from repkern.bench.train import Trainer, make_trainer
from repkern.models import create_model
from repkern.nn import ConvNormAct, CSLABlock
from repkern.ops import use_backend
from repkern.optim import RepSGD, grad_mults, weight_decay_groups

__all__ = ["RepOptCase", "RepOptOptions", "repopt_cases", "run_repopt"]

_SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True}
_DECAY = 4e-5
# float64, of a weight after the steps of the check; the bound grows with the depth of the network.
_ROUNDING, _CHECK_STEPS, _CHECK_WIDTH = 1e-9, 3, 0.125


@dataclass(frozen=True)
class RepOptCase:
    """A network of `create_model` and a batch of square images."""

    name: str
    model: str
    batch: int
    size: int


@dataclass(frozen=True)
class RepOptOptions:
    """What to measure and how long."""

    backend: str = "auto"
    device: str = "cpu"
    pairs: int = 7
    channels_last: bool = False
    width: float = 1.0


def repopt_cases() -> list[RepOptCase]:
    """RepOpt-VGG-B1 and a small RepVGG, at a size where a step takes about a second on two cores."""
    return [
        RepOptCase("repvgg_a0_b16_128", "repvgg_a0", 16, 128),
        RepOptCase("repopt_vgg_b1_b8_128", "repopt_vgg_b1", 8, 128),
    ]


@strict_fp32()
def run_repopt(
    cases: Sequence[RepOptCase], options: RepOptOptions, on_row: Callable[[Row], None], say: Callable[[str], None]
) -> list[str]:
    """Hand every row to `on_row` as soon as it is measured; return the failed checks in words."""
    settle_allocator()
    with use_backend(options.backend):
        error = _error(options)
    if not error <= 1:
        return [f"training with RepSGD is not that of its CSLA blocks: {error:.3g} times the bound off"]
    for number, case in enumerate(cases, 1):
        say(f"[{number}/{len(cases)}] {case.name}: batch {case.batch}, {case.size} x {case.size}")
        _measure(case, _trainers(case, options), error, options, on_row)
    return []


def _trainers(case: RepOptCase, options: RepOptOptions) -> dict[str, Trainer]:
    """Ours, and what it is compared with, on batches of their own that are equal."""

    def made(block: str) -> nn.Module:
        torch.manual_seed(0)
        return create_model(case.model, block=block, width=options.width).to(options.device)

    networks = {
        "repopt": made("conv_bn"),
        "plain RepVGG": plain_form(made("repvgg")),
        "our RepVGG": made("repvgg"),
        "plain, SGD": made("conv_bn"),
    }
    trainers: dict[str, Trainer] = {}
    for name, network in networks.items():
        if options.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trainer = make_trainer(network, case.batch, case.size, options.device, options.channels_last)
        groups = weight_decay_groups(network, _DECAY)
        if name == "repopt":
            trainer.optimizer = RepSGD(groups, grad_mults=grad_mults_of(network), **_SGD)
        else:
            trainer.optimizer = torch.optim.SGD(groups, **_SGD)
        trainers[name] = trainer
    return trainers


def _measure(
    case: RepOptCase,
    trainers: Mapping[str, Trainer],
    error: float,
    options: RepOptOptions,
    on_row: Callable[[Row], None],
) -> None:
    works = {
        name: Workload(lambda _, trainer=trainer: trainer.step(), around=lambda: use_backend(options.backend))  # type: ignore[misc]
        for name, trainer in trainers.items()
    }
    samples = measure_pairs(works, pairs=options.pairs, device=options.device)
    p20, p50, p80 = (1e3 * value for value in quantiles(samples["repopt"]))
    for rival in list(trainers)[1:]:
        ratio = ratio_of_pairs(samples[rival], samples["repopt"])
        target = targets.repopt_target(options.device, case.name, rival)
        on_row(Row(
            kind="repopt", op="train_step", case=case.name, what="step", dtype="float32", device=options.device,
            mode="channels_last" if options.channels_last else "eager", backend=f"repopt/{options.backend}",
            ms_p20=p20, ms=p50, ms_p80=p80, baseline=rival, baseline_ms=1e3 * quantiles(samples[rival]).p50,
            ratio_p20=ratio.p20, ratio=ratio.p50, ratio_p80=ratio.p80, pairs=len(samples["repopt"]),
            error_over_bound=error, target=str(target or ""), verdict=targets.verdict(target, ratio.p50),
        ))  # fmt: skip


def _error(options: RepOptOptions) -> float:
    """Steps of a narrow network in float64 with RepSGD, against the same steps of its CSLA blocks by SGD."""
    torch.manual_seed(0)
    branched = create_model("repvgg_a0", block="csla", width=_CHECK_WIDTH, num_classes=10).to(options.device).double()
    plain = create_model("repvgg_a0", block="conv_bn", width=_CHECK_WIDTH, num_classes=10)
    plain = plain.to(options.device).double()
    scales = _share(branched, plain)
    ours = RepSGD(plain.parameters(), weight_decay=_DECAY, grad_mults=grad_mults(plain, scales), **_SGD)
    trained = [parameter for parameter in branched.parameters() if parameter.requires_grad]
    theirs = torch.optim.SGD(trained, weight_decay=_DECAY, **_SGD)
    for _ in range(_CHECK_STEPS):
        images = torch.randn(8, 3, 64, 64, dtype=torch.float64, device=options.device)
        for network, optimizer in ((plain, ours), (branched, theirs)):
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()
    largest = 0.0
    for name, block in branched.named_modules():
        if isinstance(block, CSLABlock):
            twin = plain.get_submodule(name)
            assert isinstance(twin, ConvNormAct)
            wanted = block.summed_kernel().detach()
            off = (twin.conv.weight.detach() - wanted).abs().max() / wanted.abs().max()
            largest = max(largest, float(off) / _ROUNDING)
    return largest


@torch.no_grad()
def _share(branched: nn.Module, plain: nn.Module) -> dict[str, torch.Tensor]:
    """Give `plain` the kernels that the blocks of `branched` compute, with scales drawn here, and return the scales."""
    weights = {name: tensor for name, tensor in branched.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(weights, strict=False)
    scales: dict[str, torch.Tensor] = {}
    for name, block in branched.named_modules():
        if not isinstance(block, CSLABlock):
            continue
        for scale in (block.dense_scale, block.pointwise_scale):
            if scale is not None:
                scale.weight.uniform_(0.5, 1.5)
        parts = {part: getattr(block, part) for part in ("dense_scale", "pointwise_scale", "identity_scale")}
        scales |= {
            f"{name}.{part}": scale.weight.detach().clone() for part, scale in parts.items() if scale is not None
        }
        plain.get_parameter(f"{name}.conv.weight").copy_(block.summed_kernel())
    return scales
