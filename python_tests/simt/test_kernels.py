"""The CUDA sources run on the host: every lane order, every arithmetic, tables that overflow, awkward pointers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from repkern import testing
from repkern.ops import OPS, use_backend
from repkern.ops._library import Op
from repkern.ops._select import why_not
from repkern.ops.orepa_squeeze.samples import _backward, _forward, random_layer
from repkern.testing import Sample, error_bounds
from repkern.testing.inputs import as_float, map_tensors

pytestmark = pytest.mark.skipif(
    why_not("simt", "cpu") is not None, reason=f"no host build of the kernels: {why_not('simt', 'cpu')}"
)

ORDERS = ("forward", "reverse", "random1", "random2")
TF32_ROUNDOFF = 2.0**-11
# In-place ops have these checks in test_grad_mult_steps.py.
RETURNING = [op for op in OPS.values() if not op.mutates and "simt" in op.backends]
ALL = [pytest.param(op, sample, id=f"{op.name}-{sample}") for op in RETURNING for sample in testing.samples_of(op)]
QUICK = [case for case in ALL if not case.values[1].slow]
# What test_tf32 is for: no product of matrices is in branch_norm_add, and outputs of winograd_conv2d do not grow with
# every argument (test_winograd_kernels.py has its bound).
PRODUCTS = [case for case in QUICK if case.values[0].stem not in ("branch_norm_add", "winograd_conv2d")]


@contextlib.contextmanager
def tf32_allowed() -> Iterator[None]:
    """What a user sets."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def run(op: Op, sample: Sample, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    with use_backend("simt"):
        outputs = op(*map_tensors(sample.args, lambda t: t.to(dtype)))
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def exact(op: Op, sample: Sample, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    outputs = op.implementation("reference")(*map_tensors(sample.args, lambda t: as_float(t.to(dtype))))
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def check(
    op: Op, sample: Sample, outputs: list[Tensor], bounds: list[Tensor], dtype: torch.dtype = torch.float32
) -> None:
    for number, (got, wanted, bound) in enumerate(zip(outputs, exact(op, sample, dtype), bounds, strict=True)):
        testing.assert_close(got, wanted, bound, f"{op.name} {sample}, output {number}")


@pytest.mark.parametrize(("op", "sample"), ALL)
def test_every_lane_order_gives_the_same_bits_within_the_bound(
    op: Op, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for order in ORDERS:
        monkeypatch.setenv("REPKERN_SIMT_ORDER", order)
        results.append(run(op, sample))
    check(op, sample, results[0], error_bounds(op, sample, torch.float32))
    for order, result in zip(ORDERS, results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True)), f"order {order} differs"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("op", "sample"), QUICK)
def test_float64(op: Op, sample: Sample, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPKERN_SIMT_ORDER", order)
    check(op, sample, run(op, sample, torch.float64), error_bounds(op, sample, torch.float64), torch.float64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("op", "sample"), PRODUCTS)
def test_multiply_add_variant(op: Op, sample: Sample, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPKERN_SIMT_ORDER", order)
    monkeypatch.setenv("REPKERN_CUDA_FP32", "ffma")
    check(op, sample, run(op, sample), error_bounds(op, sample, torch.float32))


@pytest.mark.parametrize(("op", "sample"), PRODUCTS)
def test_tf32(op: Op, sample: Sample) -> None:
    """Two operands rounded to 11 bits: (1 + u)^2 - 1 more on every product, besides the fp32 bound."""
    magnitudes = exact(op, Sample(sample.name, map_tensors(sample.args, torch.Tensor.abs), sample.lengths))
    rounding = 2 * TF32_ROUNDOFF + TF32_ROUNDOFF**2
    bounds = [
        bound + rounding * magnitude.double()
        for bound, magnitude in zip(error_bounds(op, sample, torch.float32), magnitudes, strict=True)
    ]
    with tf32_allowed():
        outputs = run(op, sample)
    check(op, sample, outputs, bounds)


def test_tf32_is_another_arithmetic() -> None:
    op = OPS["orepa_squeeze_many"]
    sample = _forward("c40", [random_layer(40, 24, 3, generator=torch.Generator().manual_seed(3))])
    wanted, bound = exact(op, sample)[0], error_bounds(op, sample, torch.float32)[0]
    assert testing.worst_ratio(run(op, sample)[0], wanted, bound)[0] < 1
    with tf32_allowed():
        assert testing.worst_ratio(run(op, sample)[0], wanted, bound)[0] > 5


def test_compensated_products_are_as_good_as_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["orepa_squeeze_many"]
    without = ("origin", "avg", "prior", "pointwise", "project")
    sample = _forward("deep", [random_layer(64, 14, 3, cm=256, without=without, scale="none")])
    wanted = exact(op, sample)[0]
    compensated = (run(op, sample)[0] - wanted).square().mean().sqrt()
    monkeypatch.setenv("REPKERN_CUDA_FP32", "ffma")
    plain = (run(op, sample)[0] - wanted).square().mean().sqrt()
    assert compensated < 1.5 * plain


def test_more_layers_than_a_launch_holds() -> None:
    generator = torch.Generator().manual_seed(5)
    layers = [
        random_layer(1 + n % 5, 1 + n % 3, 1 if n % 4 == 0 else 3, expansion=1, generator=generator) for n in range(53)
    ]
    for name, make in (("orepa_squeeze_many", _forward), ("orepa_squeeze_many_backward", _backward)):
        sample = make("fifty_three", layers)
        check(OPS[name], sample, run(OPS[name], sample), error_bounds(OPS[name], sample, torch.float32))


@pytest.mark.parametrize("k", [9, 11, 13, 17])
def test_kernels_larger_than_a_tile(k: int) -> None:
    layers = [random_layer(3, 2, k, cm=4, expansion=2, generator=torch.Generator().manual_seed(k))]
    for name, make in (("orepa_squeeze_many", _forward), ("orepa_squeeze_many_backward", _backward)):
        sample = make(f"k{k}", layers)
        check(OPS[name], sample, run(OPS[name], sample), error_bounds(OPS[name], sample, torch.float32))


def test_split_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough output channels that grad_reduce is added up from slices."""
    op = OPS["orepa_squeeze_many_backward"]
    layers = [random_layer(8, 150, 3, expansion=1, generator=torch.Generator().manual_seed(4))]
    sample = _backward("split", layers)
    first = run(op, sample)
    check(op, sample, first, error_bounds(op, sample, torch.float32))
    monkeypatch.setenv("REPKERN_SIMT_ORDER", "reverse")
    assert all(torch.equal(a, b) for a, b in zip(first, run(op, sample), strict=True))


def test_pointers_that_are_not_16_byte_aligned() -> None:
    """Channel counts allow 16-byte copies, the address of the tensor does not."""
    op = OPS["orepa_squeeze_many"]
    sample = _forward("aligned", [random_layer(32, 14, 3, generator=torch.Generator().manual_seed(6))])

    def shifted(tensor: Tensor) -> Tensor:
        buffer = torch.empty(tensor.numel() + 1, dtype=torch.float32)
        buffer[1:] = tensor.flatten()
        return buffer[1:].view(tensor.shape)

    wanted = run(op, sample)[0]
    with use_backend("simt"):
        got = op(*map_tensors(sample.args, shifted))[0]
    assert torch.equal(got, wanted)


def test_a_failure_of_the_executor_is_a_runtime_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPKERN_SIMT_ORDER", "sideways")
    op, sample = QUICK[0].values[:2]
    with pytest.raises(
        RuntimeError, match="REPKERN_SIMT_ORDER must be forward, reverse, random1 or random2, got 'sideways'"
    ):
        run(op, sample)
    monkeypatch.delenv("REPKERN_SIMT_ORDER")
    check(op, sample, run(op, sample), error_bounds(op, sample, torch.float32))
