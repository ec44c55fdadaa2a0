"""The public function: two stacked convolutions equal one with the composed kernel."""

import pytest
import torch
from torch.nn.functional import conv2d

from repkern import testing
from repkern.ops import compose_sequential


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (1, 3), (3, 3), (5, 3), (2, 4)])
def test_equals_stacked_convolutions(k1, k2, groups):
    first = torch.randn(8, 4 // groups, k1, k1, dtype=torch.float64)
    second = torch.randn(12, 8 // groups, k2, k2, dtype=torch.float64)
    x = torch.randn(2, 4, 11, 13, dtype=torch.float64)
    stacked = conv2d(conv2d(x, first, groups=groups), second, groups=groups)
    composed = conv2d(x, compose_sequential(first, second, groups=groups), groups=groups)
    testing.assert_close(composed, stacked, 1e-13 * float(stacked.abs().max()))


def test_gradcheck():
    first = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: compose_sequential(a, b, groups=2), (first, second))
    assert torch.autograd.gradgradcheck(lambda a, b: compose_sequential(a, b, groups=2), (first, second))


def test_half_is_computed_in_float32():
    first, second = torch.randn(4, 2, 3, 3), torch.randn(3, 4, 3, 3)
    kernel = compose_sequential(first.bfloat16(), second.bfloat16())
    exact = compose_sequential(first.bfloat16().double(), second.bfloat16().double())
    assert kernel.dtype == torch.bfloat16
    testing.assert_close(kernel, exact, exact.abs() * torch.finfo(torch.bfloat16).eps + 1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fullgraph_compile():
    first = torch.randn(4, 2, 3, 3, requires_grad=True)
    second = torch.randn(3, 4, 3, 3, requires_grad=True)
    compiled = torch.compile(lambda a, b: compose_sequential(a, b).square().sum(), fullgraph=True)
    got = torch.autograd.grad(compiled(first, second), (first, second))
    wanted = torch.autograd.grad(compose_sequential(first, second).square().sum(), (first, second))
    for a, b in zip(got, wanted, strict=True):
        testing.assert_close(a, b, 1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(
    ("first", "second", "groups", "match"),
    [
        ((4, 2, 3, 3), (3, 5, 3, 3), 1, r"takes 5 x 1 groups = 5 channels, but `first` gives 4"),
        ((4, 2, 3, 3), (3, 2, 3, 3), 2, r"the 3 output channels of `second` must be divisible by `groups` \(=2\)"),
        ((4, 2, 3, 2), (3, 4, 3, 3), 1, r"`first` must be a non-empty \[out, in/groups, K, K\], got \(4, 2, 3, 2\)"),
        ((4, 2, 3, 3), (3, 4, 3), 1, r"`second` must be"),
        ((4, 0, 3, 3), (3, 4, 3, 3), 1, r"non-empty"),
        ((4, 2, 3, 3), (3, 4, 3, 3), 0, r"`groups` must be at least 1, got 0"),
    ],
)
def test_bad_shapes(first, second, groups, match):
    with pytest.raises(ValueError, match=match):
        compose_sequential(torch.zeros(first), torch.zeros(second), groups=groups)
