"""The prior filter of layers in half precision is float32, the default one and a given one, on every backend."""

import pytest
import torch

from repkern import testing
from repkern.ops import OPS, SqueezeBranches, orepa_squeeze, orepa_squeeze_many
from repkern.ops.orepa_squeeze import samples
from repkern.ops.orepa_squeeze.prior import dct_filter

TARGETS = [pytest.param(target, id=str(target)) for target in testing.targets()]
HALF = [torch.float16, torch.bfloat16]


def _bounded(layer, dtype):
    """The kernel in float64 with the float32 filter, and how far one in float32, then rounded, may be off."""
    exact = SqueezeBranches(*(testing.as_float(t) if isinstance(t, torch.Tensor) else t for t in layer))
    sample = samples._forward("half", [exact], dtype)
    op = OPS["orepa_squeeze_many"]
    (wanted,) = op.implementation("reference")(*sample.args[:2], None, False)
    (bound,) = testing.error_bounds(op, sample, torch.float32)
    bound = bound + torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # cosines of right angles round to 0
    return wanted, bound


@pytest.mark.parametrize("given", [False, True], ids=["default", "given"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("target", TARGETS)
def test_a_filter_is_not_rounded_to_half(target, dtype, given):
    prior, scale = torch.randn(9, 5).to(dtype), torch.randn(1, 9).to(dtype)
    filters = dct_filter(9, 3, dtype=torch.float32)
    tensors = [t.to(target.device) for t in (prior, scale, filters)]
    with target.active():
        kernel = orepa_squeeze(
            torch.zeros(9, 5, 3, 3, dtype=dtype, device=target.device),
            prior=tensors[0],
            scale=torch.cat([tensors[1], tensors[1]]),
            prior_filter=tensors[2] if given else None,
        )
    layer = SqueezeBranches(
        torch.zeros(9, 5, 3, 3, dtype=dtype), prior=prior, scale=torch.cat([scale, scale]), prior_filter=filters
    )
    wanted, bound = _bounded(layer, dtype)
    assert kernel.dtype is dtype
    testing.assert_close(kernel, wanted, bound, "the kernel")


@pytest.mark.parametrize("dtype", HALF)
def test_float32_of_half_layers_shows_the_filter(dtype):
    """Written in float32, one rounding of the filter to half would be 7e-4 off."""
    prior = torch.ones(4, 2, dtype=dtype)
    kernel = orepa_squeeze(torch.zeros(4, 2, 3, 3, dtype=dtype), prior=prior, out_dtype=torch.float32)
    testing.assert_close(kernel, dct_filter(4, 3, dtype=torch.float64)[:, None].expand(4, 2, 3, 3), 1e-7)


def test_a_kernel_of_no_size_is_refused():
    with pytest.raises(ValueError, match="must be odd, got 0"):
        orepa_squeeze(torch.zeros(4, 2, 0, 0), prior=torch.zeros(4, 2))


def test_gradients_see_the_float32_filter():
    prior = torch.randn(4, 2).half().requires_grad_()
    kernel = orepa_squeeze(torch.zeros(4, 2, 3, 3).half(), prior=prior, out_dtype=torch.float32)
    (grad,) = torch.autograd.grad(kernel.sum(), prior)
    wanted = dct_filter(4, 3, dtype=torch.float64).sum((1, 2))[:, None].expand(4, 2)
    testing.assert_close(grad, wanted, wanted.abs() * 2**-11 + 1e-6)


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float64])
def test_layers_and_tensors_of_two_dtypes_are_refused(other):
    single, second = SqueezeBranches(torch.zeros(2, 3, 3, 3)), SqueezeBranches(torch.zeros(2, 3, 3, 3, dtype=other))
    with pytest.raises(TypeError, match=r"`layers\[1\]\.origin` is torch\..*`layers\[0\]\.origin` is .* one dtype"):
        orepa_squeeze_many([single, second])
    with pytest.raises(TypeError, match="one dtype"):
        orepa_squeeze_many([second, single])
    with pytest.raises(TypeError, match="one dtype"):
        orepa_squeeze(single.origin, torch.zeros(2, 3, dtype=other))
    with pytest.raises(TypeError, match="one dtype"):
        orepa_squeeze(torch.zeros(2, 3, 3, 3, dtype=other), scale=torch.zeros(1, 2))
