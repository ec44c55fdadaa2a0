"""ConvNormAct: the plain convolution with its norm, deployed as every block."""

import copy

import pytest
import torch
from torch import nn

from repkern import reparameterize, replace_convs
from repkern.nn import ConvNormAct, OREPABlock


def one_branch(block, x):
    y = block.bn(block.conv(x))
    return y if block.activation is None else block.activation(y)


def test_a_step_equals_its_layers(explicit, randomize, same):
    for geometry in explicit.GEOMETRIES:
        for activation in (None, nn.ReLU(), nn.Hardswish(), nn.GELU()):
            block = randomize(explicit.make(ConvNormAct, geometry, activation=activation))
            explicit.check_step(block.train(), one_branch, same, f"train {geometry} {activation}")
            explicit.check_step(block.eval(), one_branch, same, f"eval {geometry} {activation}")
        fused = explicit.check_fused(block, same)
        assert list(dict(fused.named_children())) == ["conv", "activation"]


def test_compiled(explicit, randomize, same):
    block = randomize(explicit.make(ConvNormAct, (4, 6, 2, 3, 2, 0, 2, "zeros"), activation=nn.ReLU()))
    assert [name for name, _ in block.named_parameters()] == ["bn.weight", "bn.bias", "conv.weight"]
    explicit.check_compiles(block, same)


@pytest.mark.parametrize("kind", [ConvNormAct, OREPABlock])
def test_adopted_norms_keep_the_training_function(kind, same):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    new = replace_convs(copy.deepcopy(net), kind, preserve=True, fold_norm=True)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    same(new(x), net(x), 1e-12, "train output")
    new.eval(), net.eval()
    same(new(x), net(x), 1e-12, "eval output after one step")


def test_a_norm_that_scales_by_zero_is_left_alone():
    block = ConvNormAct(3, 4, 3)
    block.bn.weight.data[1] = 0
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match="the norm scales a channel by 0"):
        block.set_equivalent_kernel_bias(torch.zeros(4, 3, 3, 3), None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_deployed_twice(randomize):
    plain = reparameterize(nn.Sequential(randomize(ConvNormAct(3, 4, 3, activation=nn.ReLU())).eval()), inplace=True)
    assert reparameterize(plain, inplace=True) is plain
