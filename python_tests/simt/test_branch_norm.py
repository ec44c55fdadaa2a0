"""branch_norm_add's CUDA kernels on the host: every vector width, split channels, half precision, many branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from repkern import testing
from repkern.ops import OPS, use_backend
from repkern.ops._library import Op
from repkern.ops._sample import Sample
from repkern.ops._select import why_not
from repkern.ops.branch_norm_add.bounds import bounds_of
from repkern.ops.branch_norm_add.contract import statistics_dtype
from repkern.ops.branch_norm_add.samples import _Case, _sample
from repkern.testing.inputs import map_tensors

pytestmark = pytest.mark.skipif(
    why_not("simt", "cpu") is not None, reason=f"no host build of the kernels: {why_not('simt', 'cpu')}"
)

NORM_OPS = [op for op in OPS.values() if op.stem == "branch_norm_add"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF_SUBNORMAL = 2.0**-25  # half the distance of the smallest float16 numbers, of which the bounds know nothing
CASES = (
    _Case((3, 8, 40, 48), "bgab", "silu"),  # vectors of 16 bytes, channels split
    _Case((2, 64, 40, 40), "ba", "relu", channels_last=True),
    _Case((40, 3, 14, 14), "bag", "relu6"),  # halves by twos
    _Case((1, 130, 5, 7), "bab", "hardswish", channels_last=True),  # lanes beyond the channels
    _Case((1, 8, 20, 26), "b" * 9, "silu"),  # more maps than wait as vectors
    _Case((1, 8, 8, 12), "bga" * 5 + "b", "silu", channels_last=True),
    _Case((400, 24, 1, 1), "bab", "none"),  # planes of one position: by rows
    _Case((64, 5, 7, 7), "baaab", "none"),
)


def args_in(dtype: torch.dtype, sample: Sample) -> tuple[Any, ...]:
    """Maps in `dtype`, all else as statistics are kept."""
    return map_tensors(sample.args, lambda t: t.to(dtype if t.dim() == 4 else statistics_dtype(dtype)))


def run(op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    with use_backend("simt"):
        outputs = op(*args)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def check(op: Op, args: tuple[Any, ...], outputs: list[Tensor], dtype: torch.dtype) -> None:
    exact_args = map_tensors(args, testing.as_float)
    exact = op.implementation("reference")(*exact_args)
    exact = [exact] if isinstance(exact, Tensor) else exact
    floor = HALF_SUBNORMAL if dtype is torch.float16 else 0.0
    for number, (got, wanted, bound) in enumerate(
        zip(outputs, exact, bounds_of(op.name, exact_args, dtype), strict=True)
    ):
        testing.assert_close(got, wanted, bound + floor, f"{op.name} {dtype}, output {number}")


@pytest.mark.parametrize("op", NORM_OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_widths_splits_and_types(case: _Case, dtype: torch.dtype, op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    args = args_in(dtype, _sample(op.name, case, torch.Generator().manual_seed(3)))
    results = []
    for order in ("reverse", "random1"):
        monkeypatch.setenv("REPKERN_SIMT_ORDER", order)
        results.append(run(op, args))
    check(op, args, results[0], dtype)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", NORM_OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_that_are_not_16_byte_aligned(op: Op, channels_last: bool) -> None:
    """The shape allows vectors, the addresses of the maps do not."""

    def shifted(tensor: Tensor) -> Tensor:
        if tensor.dim() != 4:
            return tensor
        buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        view = buffer[1:].as_strided(tensor.shape, tensor.stride(), 1)
        return view.copy_(tensor)

    case = _Case((3, 8, 6, 4), "bab", channels_last=channels_last)
    args = args_in(torch.float32, _sample(op.name, case, torch.Generator().manual_seed(4)))
    unaligned = map_tensors(args, shifted)
    check(op, args, run(op, unaligned), torch.float32)


def test_the_backward_sees_the_corners_that_the_forward_saw() -> None:
    """relu at sums that cancel to about nothing: whether the gradient passes follows from the output, bit for bit."""
    y = torch.randn(2, 4, 48, 48, generator=torch.Generator().manual_seed(5))
    near = [y, -y * (1 + 1e-7)]
    norm = [torch.ones(4)] * 2, [torch.zeros(4)] * 2, [torch.zeros(4)] * 2, [torch.ones(4)] * 2
    options = [1, 1], [0.0, 0.0], 1
    empty = torch.empty(0, 4)
    out = run(OPS["branch_norm_add"], (near, *norm, *options))[0]
    args = (torch.ones_like(y), near, *norm, empty, empty, None, None, *options)
    grad = run(OPS["branch_norm_add_backward"], args)[0]
    assert 0.2 < float((out > 0).float().mean()) < 0.8
    assert torch.equal(grad != 0, out > 0)
