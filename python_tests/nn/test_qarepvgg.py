"""QARepVGGBlock: one normed branch, two raw ones, and a norm after the sum."""

import pytest
import torch
from torch import nn

from repkern.nn import QARepVGGBlock

IDENTITY = (4, 4, 2, 3, 1, None, 1, "zeros")


def mean_kernel(block):
    kernel = torch.zeros_like(block.dense.weight)
    for channel in range(block.out_channels):
        kernel[channel, channel % kernel.shape[1]] = 1 / block.kernel_size[0] ** 2
    return kernel


def normed_sum(block, explicit):
    def expected(x):
        y = explicit.normed(explicit.convolved(block, x, block.dense.weight), block.dense_bn)
        y = y if block.pointwise is None else y + explicit.convolved(block, x, block.pointwise.weight)
        y = y if block.identity is None else y + x
        y = y + explicit.convolved(block, x, mean_kernel(block)) if block.average else y
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


def test_the_average_of_the_input_is_one_more_raw_branch(explicit, randomize, same):
    found = []
    for geometry in explicit.GEOMETRIES:
        block = randomize(explicit.make(QARepVGGBlock, geometry, average=True, activation=nn.ReLU()))
        assert block.average == (block.identity is not None and geometry[3] > 1)
        found.append(block.average)
        if block.average:
            explicit.check_training(block, normed_sum(block, explicit), same, str(geometry))
            explicit.check_fused(block, same)
    assert set(found) == {True, False}


def test_the_average_is_that_of_pooling_with_the_padding_counted(randomize, same):
    """YOLOv6 pools by nn.AvgPool2d(3, 1, padding=1)."""
    plain, block = (randomize(QARepVGGBlock(4, 4, 3, average=on, dtype=torch.float64)).eval() for on in (False, True))
    block.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    scale = block.post_bn.weight / torch.sqrt(block.post_bn.running_var + block.post_bn.eps)
    same(block(x), plain(x) + nn.AvgPool2d(3, 1, padding=1)(x) * scale.reshape(-1, 1, 1), 1e-12)


def test_recompute_changes_nothing_but_what_is_kept(explicit, randomize, same):
    for average in (False, True):
        block = randomize(explicit.make(QARepVGGBlock, IDENTITY, recompute="cheap", average=average))
        explicit.check_training(block, normed_sum(block, explicit), same)


def test_as_a_module(explicit, randomize, same):
    block = randomize(explicit.make(QARepVGGBlock, IDENTITY, se=2, average=True, activation=nn.ReLU()))
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
