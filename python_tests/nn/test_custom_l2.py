"""The custom L2 of RepVGG and QARepVGG, against its definition, the released values and what it is for."""

import pytest
import torch
from torch import nn

from repkern.nn import ConvNormAct, QARepVGGBlock, RepVGGBlock, custom_l2, custom_l2_parameters

F64 = {"dtype": torch.float64}


def factor(norm):
    return (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()


def least_squares(a, b, e):
    """min x^2 + y^2 with a x + b y = e, elementwise, by solving for it."""
    system = torch.stack([a, b], -1).unsqueeze(-2)
    x = torch.linalg.lstsq(system, e[..., None, None], driver="gelsd").solution
    return x.square().sum((-2, -1))


@pytest.mark.parametrize("identity", [False, True])
def test_of_repvgg_is_the_least_norm_with_the_same_centre(identity, randomize, same):
    for k, groups in ((3, 1), (5, 2), (3, 4)):
        block = randomize(RepVGGBlock(4, 4, k, groups=groups, **F64))
        t3, t1 = (factor(norm)[:, None].expand(4, 4 // groups) for norm in (block.dense_bn, block.pointwise_bn))
        kernel, at = block.dense.weight.detach(), k // 2
        centre = kernel[:, :, at, at]
        equivalent = centre * t3 + block.pointwise.weight.detach()[:, :, 0, 0] * t1
        if identity:
            for channel in range(4):
                equivalent[channel, channel % (4 // groups)] += factor(block.identity_bn)[channel]
        expected = kernel.square().sum() - centre.square().sum() + least_squares(t3, t1, equivalent).sum()
        same(block.custom_l2(include_identity=identity), expected, 1e-12)
        same(custom_l2(nn.Sequential(block, block), include_identity=identity), expected, 1e-12, "a shared block once")


def test_without_a_1x1_branch_it_is_the_ordinary_one(randomize, same):
    block = randomize(RepVGGBlock(4, 6, 1, **F64))
    same(block.custom_l2(), block.dense.weight.square().sum(), 1e-12)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("identity", [None, True, False])
def test_of_qarepvgg_is_that_of_the_kernel_before_the_last_norm(identity, average, randomize, same):
    block = randomize(QARepVGGBlock(4, 4, 3, groups=2, average=average, **F64))
    bare = QARepVGGBlock(4, 4, 3, groups=2, average=average, **F64)
    bare.load_state_dict(block.state_dict())
    bare.post_bn = nn.BatchNorm2d(4, eps=0, affine=False, **F64)
    if identity is False:
        bare.identity = None
    weight, _ = bare.equivalent_kernel_bias()
    same(custom_l2(block, include_identity=identity), weight.square().sum(), 1e-12)


def test_gradients_reach_the_kernels_and_nothing_else(randomize):
    net = nn.Sequential(randomize(RepVGGBlock(4, 4, 3, **F64)), randomize(QARepVGGBlock(4, 6, 3, **F64)))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    custom_l2(net).backward()
    wanted = ["0.dense.weight", "0.pointwise.weight", "1.dense.weight", "1.pointwise.weight"]
    assert [name for name, p in net.named_parameters() if p.grad is not None] == wanted
    kernels = dict(net.named_parameters())
    assert [id(p) for p in custom_l2_parameters(net)] == [id(kernels[name]) for name in wanted]
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert len(custom_l2_parameters(nn.Sequential(net, net))) == 4


def test_a_model_without_such_blocks_is_an_error():
    with pytest.raises(ValueError, match="ConvNormAct has no block with a custom L2"):
        custom_l2(ConvNormAct(4, 4, 3))
    with pytest.raises(ValueError, match="has no block with a custom L2"):
        custom_l2_parameters(RepVGGBlock(4, 4, 3).eval().fuse())
