"""MobileOneBlock: several normed branches of the same kernel size, 1x1 and identity."""

import pytest
import torch
from torch import nn

from repkern.nn import MobileOneBlock

GEOMETRY = (4, 4, 4, 3, 1, None, 2, "zeros")  # depthwise, dilated


def branches(block, explicit):
    def expected(x):
        y = 0
        for conv, norm in zip(block.dense, block.dense_bn, strict=True):
            y = y + explicit.normed(explicit.convolved(block, x, conv.weight), norm)
        if block.pointwise is not None:
            y = y + explicit.normed(explicit.convolved(block, x, block.pointwise.weight), block.pointwise_bn)
        if block.identity_bn is not None:
            y = y + explicit.normed(x, block.identity_bn)
        return y if block.activation is None else block.activation(y)

    return expected


def test_training_equals_the_normed_branches(explicit, randomize, same):
    for number, geometry in enumerate(explicit.GEOMETRIES):
        count = 1 + number % 4
        block = randomize(
            explicit.make(
                MobileOneBlock, geometry, num_conv_branches=count, activation=nn.ReLU() if number % 2 else None
            )
        )
        assert len(block.dense) == len(block.dense_bn) == count
        assert (block.pointwise is None) == (geometry[3] == 1)
        explicit.check_training(block, branches(block, explicit), same, str(geometry))
        explicit.check_fused(block, same)


@pytest.mark.parametrize("geometry", [GEOMETRY, (4, 4, 1, 3, 1, None, 1, "zeros")])
def test_recompute_changes_nothing_but_what_is_kept(geometry, explicit, randomize, same):
    block = randomize(explicit.make(MobileOneBlock, geometry, num_conv_branches=2, recompute="cheap"))
    explicit.check_training(block, branches(block, explicit), same)


def test_as_a_module(explicit, randomize, same):
    block = randomize(explicit.make(MobileOneBlock, GEOMETRY, num_conv_branches=3, se=2, activation=nn.ReLU()))
    explicit.check_life(block, same)
    explicit.check_half(block)
    explicit.check_every_parameter_is_used(block)
    assert list(dict(block.eval().fuse().named_children())) == ["conv", "se", "activation"]


def test_in_a_pretrained_net(explicit, randomize, same):
    explicit.check_replaced(MobileOneBlock, randomize, same)


def test_bad_arguments_name_the_value():
    with pytest.raises(ValueError, match="num_conv_branches must be from 1 to 256, got 0"):
        MobileOneBlock(4, 4, 3, num_conv_branches=0)
    block = MobileOneBlock(4, 4, 3)
    nn.init.zeros_(block.dense_bn[0].weight)
    with pytest.raises(ValueError, match=r"`dense_bn\.0` scales a channel by 0"):
        block.set_equivalent_kernel_bias(torch.randn(4, 4, 3, 3), None)
