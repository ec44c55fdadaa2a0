"""The baselines of RepVGG's Table 7: kernels that are an identity plus something."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern import reparameterize, replace_convs
from repkern.nn import DiracConv2d, TrivialRepConv2d
from repkern.testing import assert_close

KINDS = (DiracConv2d, TrivialRepConv2d)
F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_are_those_of_a_convolution(kind):
    conv = nn.Conv2d(4, 8, 3, 2, 1, 2, 2, False, "reflect")
    block = kind(4, 8, 3, 2, 1, 2, 2, False, "reflect")
    x = torch.randn(2, 4, 9, 9)
    assert block(x).shape == conv(x).shape
    assert block(x[0]).shape == conv(x[0]).shape
    assert block.bias is None
    assert isinstance(block.fuse(), nn.Conv2d)
    assert block.fuse().bias is None
    scales = {"identity_scale.weight", "scale.weight"}
    assert set(kind(4, 8, 3).state_dict()) - scales == {"deviation.weight", "bias"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ci", "co", "groups"), [(4, 4, 1), (4, 6, 2), (6, 2, 2), (4, 4, 4)])
def test_the_kernel(kind, ci, co, groups, randomize, same):
    block = randomize(kind(ci, co, 3, padding=1, groups=groups, **F64))
    same_channels = min(ci, co) // groups
    x = torch.randn(2, ci, 6, 7, requires_grad=True, **F64)
    passed = torch.zeros(2, co, 6, 7, **F64)
    for group in range(groups):
        to, since = group * co // groups, group * ci // groups
        passed[:, to : to + same_channels] = x[:, since : since + same_channels]
    weight, scale, kept = block.deviation.weight, 1.0, 1.0
    if kind is DiracConv2d:
        weight = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        scale, kept = block.scale.weight[:, None, None], block.identity_scale.weight[:, None, None]
    wanted = kept * passed + scale * functional.conv2d(x, weight, None, 1, 1, 1, groups) + block.bias[:, None, None]
    output = block(x)
    same(output, wanted, 1e-13, "output")
    leaves, toward = [x, *block.parameters()], torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad((output * toward).sum(), leaves), torch.autograd.grad((wanted * toward).sum(), leaves),
        strict=True,
    ):  # fmt: skip
        same(one, other, 1e-11, "gradient")


def test_published_initial_values():
    block = DiracConv2d(64, 64, 3)
    assert (block.identity_scale.weight == 1).all()
    assert_close(block.scale.weight, torch.full((64,), 0.1), 0, "scale")
    identity = nn.init.dirac_(torch.empty(64, 64, 3, 3))
    assert_close((block.kernel() - identity).flatten(1).norm(dim=1), torch.full((64,), 0.1), 1e-6, "the rest")
    trivial = TrivialRepConv2d(64, 64, 3)
    torch.manual_seed(3)
    trivial.reset_parameters()
    torch.manual_seed(3)
    conv = nn.Conv2d(64, 64, 3)
    assert_close(trivial.kernel(), conv.weight + identity, 0, "trivial")
    assert torch.equal(trivial.bias, conv.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_resetting_keeps_the_parameters(kind):
    block = kind(4, 4, 3)
    before = list(block.parameters())
    block.reset_parameters()
    assert all(one is other for one, other in zip(before, block.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_pretrained_net(kind, same):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)).double().eval()
    x = torch.randn(2, 3, 9, 9, **F64)
    new = replace_convs(copy.deepcopy(net), kind, preserve=True)
    assert all(isinstance(new[at], kind) for at in (0, 2))
    same(new(x), net(x), 1e-13, "preserved")
    same(reparameterize(new)(x), net(x), 1e-13, "reparameterized")
    with pytest.raises(ValueError, match=f"{kind.__name__} has none"):
        replace_convs(copy.deepcopy(net), kind, fold_norm=True)


def test_a_kernel_that_is_the_scaled_identity(same):
    block = DiracConv2d(3, 3, 3, bias=False, **F64)
    block.set_equivalent_kernel_bias(nn.init.dirac_(torch.empty(3, 3, 3, 3, **F64)), None)
    assert not block.scale.weight.any()
    assert block.deviation.weight.all()
    with pytest.raises(ValueError, match="this DiracConv2d has no bias to take the wanted one"):
        block.set_equivalent_kernel_bias(torch.zeros(3, 3, 3, 3), torch.ones(3))
