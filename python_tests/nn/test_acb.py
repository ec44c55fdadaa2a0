"""ACBlock: the square and the two line branches, gammas, norms without affine parameters."""

import pytest
import torch
from torch import nn

from repkern.nn import ACBlock

GEOMETRY = (4, 6, 2, 3, 2, 0, 2, "zeros")


def three_branches(block, explicit):
    def expected(x):
        y = explicit.normed(explicit.convolved(block, x, block.dense.weight), block.dense_bn)
        for line, norm in ((block.vertical, block.vertical_bn), (block.horizontal, block.horizontal_bn)):
            if line is not None:
                y = y + explicit.normed(explicit.convolved(block, x, line.weight), norm)
        return y if block.activation is None else block.activation(y)

    return expected


def test_training_equals_the_normed_branches(explicit, randomize, same):
    for geometry in (*explicit.GEOMETRIES, GEOMETRY, (4, 4, 1, 5, 1, (1, 3), 1, "zeros")):
        block = randomize(explicit.make(ACBlock, geometry, activation=nn.ReLU()))
        k = geometry[3]
        shapes = None if k == 1 else [(k, 1), (1, k)]
        lines = (block.vertical, block.horizontal)
        assert lines == (None, None) if k == 1 else [line.kernel_size for line in lines] == shapes
        explicit.check_training(block, three_branches(block, explicit), same, str(geometry))
        explicit.check_fused(block, same)


def test_recompute_changes_nothing_but_what_is_kept(explicit, randomize, same):
    block = randomize(explicit.make(ACBlock, GEOMETRY, recompute="cheap", activation=nn.ReLU()))
    explicit.check_training(block, three_branches(block, explicit), same)


def test_as_a_module(explicit, randomize, same):
    block = randomize(explicit.make(ACBlock, GEOMETRY, activation=nn.ReLU()))
    explicit.check_life(block, same)
    explicit.check_half(block)
    explicit.check_every_parameter_is_used(block)


def test_in_a_pretrained_net(explicit, randomize, same):
    explicit.check_replaced(ACBlock, randomize, same)


def test_norms_without_affine_parameters(explicit, same):
    block = ACBlock(4, 6, 3, use_affine=False, dtype=torch.float64)
    assert [name for name, _ in block.named_parameters()] == ["dense.weight", "vertical.weight", "horizontal.weight"]
    for norm in (block.dense_bn, block.vertical_bn, block.horizontal_bn):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    explicit.check_fused(block, same)
    weight, bias = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    block.set_equivalent_kernel_bias(weight, bias)
    same(block.equivalent_kernel_bias()[0], weight, 1e-13, "weight")
    same(block.equivalent_kernel_bias()[1], bias, 1e-13, "bias")


def test_initial_gammas():
    def gammas(*args, **options):
        return [n.weight[0].item() for n in ACBlock(4, 6, *args, **options).modules() if isinstance(n, nn.BatchNorm2d)]

    assert gammas(3) == [1, 1, 1]
    assert gammas(3, reduce_gamma=True) == pytest.approx([1 / 3] * 3)
    assert gammas(1, reduce_gamma=True) == [1]
    assert gammas(5, gamma_init=0.25) == [0.25] * 3
    with pytest.raises(ValueError, match=r"gamma_init=0.5 both set"):
        gammas(3, reduce_gamma=True, gamma_init=0.5)
    with pytest.raises(ValueError, match="need use_affine=True"):
        gammas(3, use_affine=False, reduce_gamma=True)
