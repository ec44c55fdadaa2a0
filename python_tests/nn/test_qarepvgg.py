"""QARepVGGBlock: one normed branch, two raw ones, and a norm after the sum."""

import pytest
import torch
from torch import nn

from repkern.nn import QARepVGGBlock

IDENTITY = (4, 4, 2, 3, 1, None, 1, "zeros")


def normed_sum(block, explicit):
    def expected(x):
        y = explicit.normed(explicit.convolved(block, x, block.dense.weight), block.dense_bn)
        y = y if block.pointwise is None else y + explicit.convolved(block, x, block.pointwise.weight)
        y = y if block.identity is None else y + x
        y = explicit.normed(y, block.post_bn)
        return y if block.activation is None else block.activation(y)

    return expected


def test_training_equals_the_norm_of_the_sum(explicit, randomize, same):
    for geometry in explicit.GEOMETRIES:
        ci, co, _, k, stride, *_ = geometry
        block = randomize(explicit.make(QARepVGGBlock, geometry, activation=nn.ReLU()))
        assert (block.pointwise is None) == (k == 1)
        assert (block.identity is None) == (ci != co or stride != 1 or geometry[5] in (0, (0, 3)))
        explicit.check_training(block, normed_sum(block, explicit), same, str(geometry))
        explicit.check_fused(block, same)


def test_recompute_changes_nothing_but_what_is_kept(explicit, randomize, same):
    block = randomize(explicit.make(QARepVGGBlock, IDENTITY, recompute="cheap"))
    explicit.check_training(block, normed_sum(block, explicit), same)


def test_as_a_module(explicit, randomize, same):
    block = randomize(explicit.make(QARepVGGBlock, IDENTITY, se=2, activation=nn.ReLU()))
    explicit.check_life(block, same)
    explicit.check_half(block)
    explicit.check_every_parameter_is_used(block)
    assert list(dict(block.eval().fuse().named_children())) == ["conv", "se", "activation"]


def test_in_a_pretrained_net(explicit, randomize, same):
    explicit.check_replaced(QARepVGGBlock, randomize, same)


def test_its_weights_stay_quantizable_where_those_of_repvgg_do_not():
    """A channel of tiny variance: RepVGG's identity norm folds into a huge weight, QARepVGG's identity stays 1."""
    from repkern.nn import RepVGGBlock

    x = torch.randn(8, 8, 12, 12, dtype=torch.float64)
    x[:, 3] *= 1e-3
    largest = {}
    for kind in (RepVGGBlock, QARepVGGBlock):
        torch.manual_seed(0)
        block = kind(8, 8, 3, dtype=torch.float64).train()
        with torch.no_grad():
            for _ in range(200):
                block(x)
        weight, _ = block.eval().equivalent_kernel_bias()
        largest[kind] = float(weight.detach().abs().amax() / weight.detach().abs().median())
    assert largest[RepVGGBlock] > 30 * largest[QARepVGGBlock]


def test_a_scale_of_zero_cannot_start_as_a_given_convolution():
    for name in ("dense_bn", "post_bn"):
        block = QARepVGGBlock(4, 4, 3)
        nn.init.zeros_(block.get_submodule(name).weight)
        with pytest.raises(ValueError, match=f"`{name}` scales a channel by 0"):
            block.set_equivalent_kernel_bias(torch.randn(4, 4, 3, 3), None)
