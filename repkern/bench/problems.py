"""One case made concrete: its tensors, our op, the baselines, and the float64 check with its computed bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repkern.bench.baselines import KernelFunction, eager_branch_norm_add, eager_compose, eager_kernel_of
from repkern.bench.registry import Case, Layer
from repkern.ops import OPS, Norm, SqueezeBranches, branch_norm_add, compose_sequential, orepa_squeeze_many
from repkern.ops.branch_norm_add import samples as norm_samples
from repkern.ops.orepa_squeeze.layers import kernel_shape, pack
from repkern.ops.orepa_squeeze.prior import dct_filter
from repkern.testing import Sample, error_bounds, worst_ratio
from repkern.testing.inputs import map_tensors

__all__ = ["CheckResult", "Problem", "build_problem", "squeeze_problem"]

Forward = Callable[[], list[Tensor]]
Wrap = Callable[[KernelFunction], KernelFunction]
Expected = list[tuple[Tensor, Tensor]]  # what is wanted of the forward or backward op, and how exactly
Pick = Callable[[Expected, Expected], Expected]  # those of the outputs, then of the gradients of the leaves


@dataclass(frozen=True)
class CheckResult:
    """The worst |error| / bound over all outputs and gradients, and where. Up to 1 is right."""

    worst: float
    where: str

    @property
    def ok(self) -> bool:
        """Whether everything is within its bound."""
        return self.worst <= 1


@dataclass(frozen=True)
class Problem:
    """Tensors of a case. `ours()` and `baseline(wrap)()` give the same outputs, differentiable in `leaves`."""

    case: Case
    dtype: torch.dtype
    leaves: list[Tensor]
    grads: list[Tensor]
    ours: Forward
    baseline: Callable[[Wrap], Forward]
    forward_sample: Sample
    backward_sample: Sample
    ops: tuple[str, str]
    pick: Pick = lambda forward, backward: forward + backward

    def gradients(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of all leaves for the fixed output gradients."""
        return torch.autograd.grad(outputs, self.leaves, self.grads)

    def bytes(self, what: str) -> int:
        """The least traffic: parameters read and kernels written; then all of that read and gradients written."""
        parameters = sum(t.numel() * t.element_size() for t in self.leaves)
        kernels = sum(t.numel() * t.element_size() for t in self.grads)
        forward, backward = parameters + kernels, 2 * parameters + kernels
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[what]

    def check(self, forward: Forward) -> CheckResult:
        """Compare outputs and gradients of `forward` with the float64 reference."""
        outputs = forward()
        results = [*outputs, *self.gradients(outputs)]
        names = [f"output {i}" for i in range(len(outputs))] + [f"gradient {i}" for i in range(len(self.leaves))]
        worst = CheckResult(0.0, "nothing compared")
        for name, got, (wanted, bound) in zip(names, results, self._expected(), strict=True):
            if got.shape != wanted.shape:
                return CheckResult(float("inf"), f"{name}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
            ratio, index = worst_ratio(got, wanted, bound)
            if ratio > worst.worst or worst.where == "nothing compared":
                worst = CheckResult(ratio, f"{name} at {index}")
        return worst

    def _expected(self) -> Expected:
        answer: list[Expected] = []
        for name, sample in zip(self.ops, (self.forward_sample, self.backward_sample), strict=True):
            exact = OPS[name].implementation("reference")(*map_tensors(sample.args, Tensor.double))
            wanted = [exact] if isinstance(exact, Tensor) else list(exact)
            answer.append(list(zip(wanted, error_bounds(OPS[name], sample, self.dtype), strict=True)))
        return self.pick(*answer)


def build_problem(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Problem:
    """Random tensors for `case`, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype=dtype, device=device)

    if case.op == "compose_sequential":
        return _compose_problem(case, dtype, random)
    if case.op == "branch_norm_add":
        return _norm_problem(case, dtype, random)
    return squeeze_problem(case, [_squeeze_branches(layer, random) for layer in case.layers], random)


def _detached(args: Any) -> Any:
    return map_tensors(args, lambda t: t.detach().cpu())


def _squeeze_branches(layer: Layer, random: Callable[..., Tensor]) -> SqueezeBranches:
    co, ci, k, g = layer.co, layer.ci, layer.k, layer.groups
    cig, cmg = ci // g, layer.cm // g
    common = {
        "origin": random(co, cig, k, k),
        "reduce": random(layer.cm, cig) / cig,
        "expand": random(co, cmg, k, k),
        "scale": random(layer.branches, co),
    }
    if k > 1:
        common |= {name: random(co, cig) for name in ("avg", "prior", "pointwise")}
        common |= {"depthwise": random(ci * layer.expansion, k, k), "project": random(co, cig * layer.expansion)}
    for tensor in common.values():
        tensor.requires_grad_()
    if k > 1:
        common["prior_filter"] = dct_filter(co, k).to(common["origin"])
    return SqueezeBranches(**common, groups=g, identity_reduce=True)


def _gradient_lengths(layer: SqueezeBranches) -> dict[str, int]:
    """For every gradient, the products in its longest sum, those of a product formed on the way included."""
    filters, cig, k, _ = kernel_shape(layer)
    co, taps = filters // layer.groups, k**2
    return {
        "origin": 1, "avg": taps, "prior": taps, "pointwise": 1,
        "reduce": co * taps, "expand": cig, "depthwise": co, "project": taps,
        "scale": cig * taps + _kernel_length(layer),
    }  # fmt: skip


def _kernel_length(layer: SqueezeBranches) -> int:
    """The longest sum behind an element of the kernel: the 1x1-KxK product, or dw-pw."""
    product = 1 if layer.expand is None else layer.expand.shape[1]
    separable = 1 if layer.depthwise is None else layer.depthwise.shape[0] // (kernel_shape(layer)[1] * layer.groups)
    return max(product, separable)


def squeeze_problem(case: Case, layers: Sequence[SqueezeBranches], random: Callable[..., Tensor]) -> Problem:
    """The problem of squeezing these very layers; `random(*shape)` gives the output gradients."""
    leaves = [t for layer in layers for t in layer[:9] if isinstance(t, Tensor)]
    grads = [random(*kernel_shape(layer)) for layer in layers]
    tensors, layout = pack(layers)
    lengths: list[int] = []
    for layer in layers:
        here = _gradient_lengths(layer)
        lengths += [here[field] for field, t in zip(here, layer[:9], strict=True) if t is not None]

    def baseline(wrap: Wrap) -> Forward:
        kernels = [eager_kernel_of(layer, wrap) for layer in layers]
        return lambda: [kernel() for kernel in kernels]

    forward_args = _detached((list(tensors), layout, None, False))
    backward_args = _detached((grads, list(tensors), layout))
    forward_lengths = tuple(_kernel_length(layer) for layer in layers)
    return Problem(
        case, leaves[0].dtype, leaves, grads, lambda: orepa_squeeze_many(layers), baseline,
        Sample(case.name, forward_args, forward_lengths), Sample(case.name, backward_args, tuple(lengths)),
        ("orepa_squeeze_many", "orepa_squeeze_many_backward"),
    )  # fmt: skip


def _compose_problem(case: Case, dtype: torch.dtype, random: Callable[..., Tensor]) -> Problem:
    one, two = case.layers
    groups = one.groups
    first = random(one.co, one.ci // groups, one.k, one.k).requires_grad_()
    second = random(two.co, two.ci // groups, two.k, two.k).requires_grad_()
    size = one.k + two.k - 1
    grad = random(two.co, one.ci // groups, size, size)
    overlap = min(one.k, two.k) ** 2
    lengths = (two.co // groups * two.k**2, one.ci // groups * one.k**2)

    def baseline(wrap: Wrap) -> Forward:
        compose = wrap(eager_compose)
        return lambda: [compose(first, second, groups)]

    return Problem(
        case, dtype, [first, second], [grad], lambda: [compose_sequential(first, second, groups=groups)], baseline,
        Sample(case.name, _detached((first, second, groups)), (one.co // groups * overlap,)),
        Sample(case.name, _detached((grad, first, second, groups)), lengths),
        ("compose_sequential", "compose_sequential_backward"),
    )  # fmt: skip


def _norm_problem(case: Case, dtype: torch.dtype, random: Callable[..., Tensor]) -> Problem:
    assert case.maps is not None
    size = case.maps
    layout = torch.channels_last if size.channels_last else torch.contiguous_format

    def new_map() -> Tensor:
        return random(size.n, size.c, size.h, size.w).contiguous(memory_format=layout)

    maps = [new_map().requires_grad_() for _ in range(size.branches)]
    weights, biases = ([random(size.c).requires_grad_() for _ in maps] for _ in range(2))
    norms = [Norm(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    grad = new_map()

    def baseline(wrap: Wrap) -> Forward:
        add = wrap(eager_branch_norm_add)
        return lambda: [add(maps, weights, biases)]

    def pick(forward: Expected, backward: Expected) -> Expected:
        *of_maps, weight, bias = backward
        rows = list(zip(weight[0].unbind(0), weight[1].unbind(0), strict=True))
        return [forward[0], *of_maps, *rows, *[bias] * size.branches]

    forward_sample, backward_sample = norm_samples.relu_samples(
        case.name, *_detached((grad, maps, weights, biases)), eps=norms[0].eps
    )
    return Problem(
        case, dtype, [*maps, *weights, *biases], [grad], lambda: [branch_norm_add(maps, norms, "relu")[0]], baseline,
        forward_sample, backward_sample, ("branch_norm_add", "branch_norm_add_backward"), pick,
    )  # fmt: skip
