"""CSLABlock: one convolution in place of three maps, and what its gradients mean for the plain kernel."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern.nn import CSLABlock

GEOMETRY = (4, 4, 2, 3, 1, None, 1, "zeros")


def scaled_branches(block, explicit):
    def expected(x):
        y = explicit.convolved(block, x, block.dense.weight) * block.dense_scale.weight[:, None, None]
        if block.pointwise is not None:
            y = y + explicit.convolved(block, x, block.pointwise.weight) * block.pointwise_scale.weight[:, None, None]
        if block.identity_scale is not None:
            y = y + x * block.identity_scale.weight[:, None, None]
        y = explicit.normed(y, block.bn)
        return y if block.activation is None else block.activation(y)

    return expected


@pytest.mark.parametrize("train_scales", ["all", "identity", "none"])
def test_training_equals_the_scaled_branches(train_scales, explicit, randomize, same):
    for geometry in explicit.GEOMETRIES:
        ci, co, _, k, stride, *_ = geometry
        block = randomize(explicit.make(CSLABlock, geometry, train_scales=train_scales, activation=nn.ReLU()))
        assert (block.pointwise is None) == (block.pointwise_scale is None) == (k == 1)
        assert (block.identity_scale is None) == (ci != co or stride != 1 or geometry[5] in (0, (0, 3)))
        trained = [name for name, p in block.named_parameters() if name.endswith("scale.weight") and p.requires_grad]
        wanted = {"all": ("dense_scale", "pointwise_scale", "identity_scale"), "identity": ("identity_scale",)}
        assert trained == [f"{n}.weight" for n in wanted.get(train_scales, ()) if getattr(block, n) is not None]
        explicit.check_training(block, scaled_branches(block, explicit), same, str(geometry))
        explicit.check_fused(block, same)


def test_one_convolution_runs(explicit):
    block = explicit.make(CSLABlock, GEOMETRY)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        block(explicit.images(4))
    assert sum(event.name == "aten::conv2d" for event in profile.events()) == 1


def test_trained_by_sgd_it_is_the_plain_kernel_with_multiplied_gradients(explicit, same):
    """Proposition 1 of the paper: eq. 3 for the multiplier, eq. 4 for the start."""
    block = explicit.make(CSLABlock, GEOMETRY, dense_scale=torch.rand(4), pointwise_scale=torch.rand(4)).train()
    ones = torch.ones(4, dtype=torch.float64)
    pad = [1] * 4
    identity = functional.pad(torch.diag_embed(ones.view(2, 2)).flatten(0, 1)[:, :, None, None], pad)
    multiplier = block.dense_scale.weight[:, None, None, None].square() * torch.ones_like(block.dense.weight)
    square = block.pointwise_scale.weight[:, None, None, None].square() * torch.ones_like(block.pointwise.weight)
    multiplier = (multiplier + functional.pad(square, pad) + identity).detach()
    plain = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False, dtype=torch.float64)
    plain.weight.data.copy_(block.summed_kernel())
    norm = nn.BatchNorm2d(4, affine=False, dtype=torch.float64)
    ours = torch.optim.SGD([p for p in block.parameters() if p.requires_grad], 0.3, momentum=0.9)
    theirs = torch.optim.SGD([*plain.parameters()], 0.3, momentum=0.9)
    block.bn.requires_grad_(False)
    for _ in range(4):
        x, toward = explicit.images(4), explicit.images(4)
        for optimizer, module in ((ours, block), (theirs, nn.Sequential(plain, norm))):
            optimizer.zero_grad()
            (module(x) * toward).sum().mul(0.01).backward()
        plain.weight.grad *= multiplier
        ours.step()
        theirs.step()
    same(block.summed_kernel(), plain.weight, 1e-12, "kernel after 4 steps")
    assert not torch.equal(
        block.identity_scale.weight,
        torch.ones(len(block.identity_scale.weight), dtype=block.identity_scale.weight.dtype),
    )


def test_initial_scales():
    block = CSLABlock(4, 4, 3, dense_scale=0.5, pointwise_scale=torch.arange(4.0), identity_scale=-1)
    assert block.dense_scale.weight.tolist() == [0.5] * 4
    assert block.pointwise_scale.weight.tolist() == [0, 1, 2, 3]
    assert block.identity_scale.weight.tolist() == [-1] * 4
    with pytest.raises(ValueError, match=r"dense_scale must be a number or \[4\], got \(3,\)"):
        CSLABlock(4, 4, 3, dense_scale=torch.ones(3))
    with pytest.raises(ValueError, match="train_scales must be one of all, identity, none, got 'some'"):
        CSLABlock(4, 4, 3, train_scales="some")


def test_as_a_module(explicit, randomize, same):
    block = randomize(explicit.make(CSLABlock, GEOMETRY, activation=nn.ReLU()))
    explicit.check_life(block, same)
    explicit.check_half(block)
    explicit.check_every_parameter_is_used(block)
    explicit.check_compiles(randomize(explicit.make(CSLABlock, GEOMETRY, train_scales="all")), same)


def test_in_a_pretrained_net(explicit, randomize, same):
    explicit.check_replaced(CSLABlock, randomize, same)
    from repkern import replace_convs

    net = replace_convs(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), CSLABlock)
    assert [net[0].dense_scale.weight.requires_grad, net[0].identity_scale.weight.requires_grad] == [False, True]


def test_a_scale_of_zero_cannot_start_as_a_given_convolution():
    with pytest.raises(ValueError, match="`dense_scale` is 0 for a channel"):
        CSLABlock(4, 4, 3, dense_scale=0.0).set_equivalent_kernel_bias(torch.randn(4, 4, 3, 3), None)
