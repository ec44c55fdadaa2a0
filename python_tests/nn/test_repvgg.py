"""RepVGGBlock: its branches in training, squeeze-excite, and what stays when it is fused."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern.nn import OREPARepVGGBlock, RepVGGBlock, SqueezeExcite

F64 = {"dtype": torch.float64}
IDENTITY = (4, 4, 2, 3, 1, None, 1, "zeros")


def three_branches(block, explicit):
    def expected(x):
        y = explicit.normed(explicit.convolved(block, x, block.dense.weight), block.dense_bn)
        if block.pointwise is not None:
            y = y + explicit.normed(explicit.convolved(block, x, block.pointwise.weight), block.pointwise_bn)
        if block.identity_bn is not None:
            y = y + explicit.normed(x, block.identity_bn)
        return y if block.activation is None else block.activation(y)

    return expected


def test_training_equals_the_normed_branches(explicit, randomize, same):
    for geometry in explicit.GEOMETRIES:
        for activation in (None, nn.ReLU()):
            block = randomize(explicit.make(RepVGGBlock, geometry, activation=activation))
            ci, co, _, k, stride, *_ = geometry
            assert (block.pointwise is None) == (k == 1)
            assert (block.identity_bn is None) == (ci != co or stride != 1 or geometry[5] in (0, (0, 3)))
            explicit.check_training(block, three_branches(block, explicit), same, str(geometry))


def test_recompute_changes_nothing_but_what_is_kept(explicit, randomize, same):
    block = randomize(explicit.make(RepVGGBlock, IDENTITY, recompute="cheap", activation=nn.ReLU()))
    explicit.check_training(block, three_branches(block, explicit), same)


@pytest.mark.parametrize("kind", [RepVGGBlock, OREPARepVGGBlock])
def test_fused(kind, explicit, randomize, same):
    for geometry in explicit.GEOMETRIES:
        if kind is RepVGGBlock or geometry[3] > 1:
            fused = explicit.check_fused(randomize(explicit.make(kind, geometry)), same)
            assert fused.padding_mode == geometry[7]
            assert fused.dilation == (geometry[6],) * 2


def test_as_a_module(explicit, randomize, same):
    block = randomize(explicit.make(RepVGGBlock, IDENTITY, activation=nn.ReLU(), se=2, post_se=1))
    explicit.check_life(block, same)
    explicit.check_half(block)
    explicit.check_every_parameter_is_used(block)
    explicit.check_compiles(randomize(explicit.make(RepVGGBlock, IDENTITY, activation=nn.ReLU())), same)


def test_in_a_pretrained_net(explicit, randomize, same):
    explicit.check_replaced(RepVGGBlock, randomize, same)


@pytest.mark.parametrize("kind", [RepVGGBlock, OREPARepVGGBlock])
def test_squeeze_excite_before_and_after_the_activation(kind, explicit, randomize, same):
    for where in ({"se": 2}, {"post_se": 3}, {"se": 1, "post_se": 2}):
        block = randomize(kind(4, 6, 3, 2, activation=nn.Hardswish(), **where, **F64)).eval()
        x = explicit.images(4)
        bare = kind(4, 6, 3, 2, **F64).eval()
        names = dict(bare.state_dict())
        bare.load_state_dict({name: tensor for name, tensor in block.state_dict().items() if name in names})
        y = bare(x)
        y = y if block.se is None else block.se(y)
        y = functional.hardswish(y)
        y = y if block.post_se is None else block.post_se(y)
        same(block(x), y, explicit.FUSED, "squeeze-excite")
        fused = explicit.check_fused(block, same)
        order = ["conv", *(["se"] if "se" in where else []), "activation", *(["post_se"] if "post_se" in where else [])]
        assert list(dict(fused.named_children())) == order
        assert fused[1] is not block.se


@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
def test_squeeze_excite_pools_all_pixels_of_any_shape(gate, same):
    module = SqueezeExcite(6, 2, gate=gate, **F64)
    for height, width in ((8, 4), (4, 8), (1, 1)):
        x = torch.randn(1, 6, height, width, **F64)
        pooled = x.flatten(2).mean(2)
        hidden = functional.relu(functional.linear(pooled, module.down.weight[:, :, 0, 0], module.down.bias))
        excited = functional.linear(hidden, module.up.weight[:, :, 0, 0], module.up.bias)
        gated = torch.sigmoid(excited) if gate == "sigmoid" else functional.relu6(excited + 3) / 6
        same(module(x), x * gated[:, :, None, None], 1e-14)


def test_a_scale_of_zero_cannot_start_as_a_given_convolution():
    block = RepVGGBlock(4, 4, 3)
    nn.init.zeros_(block.dense_bn.weight)
    with pytest.raises(ValueError, match="`dense_bn` scales a channel by 0"):
        block.set_equivalent_kernel_bias(torch.randn(4, 4, 3, 3), None)


def test_bad_arguments_name_the_value():
    with pytest.raises(ValueError, match="recompute must be one of none, cheap, got 'all'"):
        RepVGGBlock(4, 4, 3, recompute="all")
    with pytest.raises(ValueError, match="4 channels reduced to 0"):
        RepVGGBlock(4, 4, 3, se=0)
    with pytest.raises(ValueError, match="gate must be one of sigmoid, hardsigmoid, got 'tanh'"):
        SqueezeExcite(4, 2, gate="tanh")
    with pytest.raises(TypeError, match=r"dtype must be .* got torch.int8"):
        RepVGGBlock(4, 4, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"RepVGGBlock: the input must be \[\(N,\) 4, H, W\], got \(2, 3, 8, 8\)"):
        RepVGGBlock(4, 4, 3)(torch.randn(2, 3, 8, 8))
