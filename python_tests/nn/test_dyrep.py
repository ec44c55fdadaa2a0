"""DyRepBlock: its branches one by one, nested blocks, and branches that come and go without changing the function."""

import copy

import pytest
import torch
from torch import nn

from repkern import reparameterize
from repkern.nn import DyRepBlock
from repkern.nn.seven_branches import SEVEN_BRANCHES

F64 = {"dtype": torch.float64}
CASES = (
    (6, 6, 3, 3, 1, None, 1, "zeros"),
    (4, 6, 2, 5, 2, (0, 4), (1, 2), "zeros"),
    (4, 4, 4, 3, 1, 2, 3, "zeros"),
    (4, 12, 1, 7, 1, 2, 1, "zeros"),
)
NESTED = (4, 4, 2, 3, 1, None, 1, "zeros")


def kernel_of(reduce):
    return reduce.kernel() if hasattr(reduce, "kernel") else reduce.weight


def branch_map(block, name, x, explicit):
    if name == "kxk":
        return nested(block.dense, x, explicit) if isinstance(block.dense, DyRepBlock) else block.dense(x)
    if name == "1x1_avg":
        if block.avg is None:
            return explicit.pooled(block, explicit.padded(block, x))
        z = explicit.one_by_one(block, x, block.avg.weight)
        return explicit.pooled(block, explicit.normed_and_padded(block, z, block.avg_inner_bn))
    if name == "1x1_kxk":
        z = explicit.padded(block, x)
        if block.reduce is not None:
            z = explicit.one_by_one(block, x, kernel_of(block.reduce))
            z = explicit.normed_and_padded(block, z, block.reduce_bn)
        if isinstance(block.expand, DyRepBlock):
            return nested(block.expand, z, explicit)
        return explicit.expanded(block, z, block.expand.weight)
    if name == "id":
        return x
    layer = {"1x1": block.pointwise, "1xk": block.horizontal, "kx1": block.vertical}[name]
    return explicit.convolved(block, x, layer.weight)


def nested(block, x, explicit):
    return sum(block.last_norm(name)(branch_map(block, name, x, explicit)) for name in block.branches)


def branches(explicit):
    def literal(block, x):
        y = nested(block, x, explicit)
        return y if block.activation is None else block.activation(y)

    return literal


def with_nested(randomize, **options):
    options |= {"groups": 2, **F64}
    block = DyRepBlock(4, 4, 3, activation=nn.ReLU(), **options)
    block.dense = DyRepBlock(4, 4, 3, **options)
    block.expand = DyRepBlock(4, 4, 3, padding=0, **options)
    return randomize(block)


@pytest.mark.parametrize("border", ["exact", "released"])
def test_a_step_equals_the_branches_one_by_one(border, explicit, randomize, same):
    for geometry in (*explicit.GEOMETRIES, *CASES):
        block = randomize(explicit.make(DyRepBlock, geometry, border=border, activation=nn.ReLU()))
        if geometry[3] == 1:
            assert set(block.branches) <= {"1x1_kxk", "kxk", "id"}
        else:
            assert set(SEVEN_BRANCHES) - set(block.branches) <= {"id"}
        explicit.check_step(block.train(), branches(explicit), same, f"train {geometry}")
        explicit.check_step(block.eval(), branches(explicit), same, f"eval {geometry}")
        explicit.check_fused(block, same, 13)


@pytest.mark.parametrize("name", [name for name in SEVEN_BRANCHES if name != "kxk"])
def test_each_branch_alone_beside_the_kxk(name, explicit, randomize, same):
    block = randomize(DyRepBlock(4, 4, 3, groups=2, branches=(name, "kxk"), **F64)).train()
    assert set(block.branches) == {name, "kxk"}
    explicit.check_step(block, branches(explicit), same)
    explicit.check_fused(block, same)


@pytest.mark.parametrize("options", [{}, {"border": "released"}, {"recompute": "cheap"}, {"padding_mode": "reflect"}])
def test_nested_blocks(options, explicit, randomize, same):
    block = with_nested(randomize, **options).train()
    assert "id" not in block.expand.branches
    explicit.check_step(block, branches(explicit), same, str(options))
    explicit.check_fused(block, same)
    plain = reparameterize(nn.Sequential(block))
    assert [type(module) for module in plain[0]] == [nn.Conv2d, nn.ReLU]


def test_recompute_changes_nothing(explicit, randomize, same):
    block = randomize(explicit.make(DyRepBlock, NESTED, recompute="cheap", activation=nn.ReLU())).train()
    explicit.check_step(block, branches(explicit), same)


def test_a_nested_block_as_a_module(explicit, randomize, same):
    block = with_nested(randomize)
    explicit.check_life(block, same)
    explicit.check_half(block)
    explicit.check_every_parameter_is_used(block)


def test_preserving_through_nested_blocks(randomize, same):
    block = with_nested(randomize).eval()
    inside = copy.deepcopy(block.dense.pointwise.weight)
    weight, bias = torch.randn(4, 2, 3, 3, **F64), torch.randn(4, **F64)
    block.set_equivalent_kernel_bias(weight, bias)
    same(block.equivalent_kernel_bias()[0], weight, 1e-12, "weight")
    same(block.equivalent_kernel_bias()[1], bias, 1e-12, "bias")
    assert torch.equal(block.dense.pointwise.weight, inside)


# --- growing and cutting


@pytest.mark.parametrize("bias", [True, False])
def test_grow_computes_what_the_convolution_computes(bias, same):
    conv = nn.Conv2d(4, 4, 3, 1, 2, 2, 2, bias, padding_mode="circular", **F64).eval()
    x = torch.randn(2, 4, 9, 9, **F64)
    block = DyRepBlock.grow(conv)
    assert not block.training
    same(block(x), conv(x), 1e-12, "grown")
    for name in block.branches:
        wanted = 1.0 if name == "kxk" else 0.01
        assert (block.last_norm(name).weight == wanted).all()
    assert DyRepBlock.grow(conv, branches=("kxk", "1xk"), border="released").branches == ("kxk", "1xk")
    assert not any(p.requires_grad for p in DyRepBlock.grow(conv.requires_grad_(False)).parameters())


def test_growing_the_convolutions_inside_a_block(same):
    conv = nn.Conv2d(4, 6, 3, 2, 1, **F64).eval()
    x = torch.randn(2, 4, 9, 9, **F64)
    block = DyRepBlock.grow(conv)
    block.dense = DyRepBlock.grow(block.dense)
    block.expand = DyRepBlock.grow(block.expand)
    assert block.expand.padding == (0, 0)
    same(block(x), conv(x), 1e-12, "grown inside")
    block.dense.remove_branches(["1x1"])
    block.expand.remove_branches(["1x1_avg", "1x1_kxk"])
    same(block(x), conv(x), 1e-12, "cut inside")


@pytest.mark.parametrize("nests", [False, True])
def test_adding_and_removing_keeps_the_function(nests, randomize, same):
    block = with_nested(randomize) if nests else randomize(DyRepBlock(4, 4, 3, **F64))
    block.train()
    expected = copy.deepcopy(block).eval()
    x = torch.randn(2, 4, 7, 7, **F64)
    inside = copy.deepcopy(block.dense).state_dict() if nests else {}
    shifts = sum(block.last_norm(name).bias.detach() for name in block.branches)

    def check(what):
        same(block.eval()(x), expected(x), 1e-12, what)
        now = sum(block.last_norm(name).bias.detach() for name in block.branches)
        same(now, shifts, 1e-12, f"{what}: what training adds to the mean")
        block.train()

    block.remove_branches(["1x1_avg", "id", "1x1"])
    assert block.branches == ("1x1_kxk", "kxk", "1xk", "kx1")
    assert block.avg is block.avg_bn is block.identity_bn is None
    check("removed")
    assert all(torch.equal(block.dense.state_dict()[name], inside[name]) for name in inside if "pointwise" in name)
    block.add_branches(["id", "1x1_avg"])
    assert block.branches == ("1x1_kxk", "1x1_avg", "kxk", "1xk", "kx1", "id")
    assert block.avg_bn.training
    assert block.avg_bn.weight.dtype is torch.float64
    check("added")
    names = [name.split(".")[0] for name in block.state_dict()]
    assert names == sorted(names, key=list(block._modules).index), "branches keep their place"


def test_letting_new_norms_see_data_before_the_kernel_is_taken_out(randomize, same):
    block = randomize(DyRepBlock(4, 4, 3, branches=("kxk",), **F64)).eval()
    x = torch.randn(4, 4, 7, 7, **F64)
    before, expected = block.equivalent_kernel_bias(), block(x)
    block.add_branches(["1x1_avg", "1x1_kxk"])
    block.train()(x)
    block.set_equivalent_kernel_bias(*before)
    same(block.eval()(x), expected, 1e-12, "after calibration")
    assert block.avg_bn.running_mean.abs().max() > 0


def test_changing_branches_in_single_precision(randomize):
    """Rounding once per change, of numbers the size of the branches."""
    block = randomize(DyRepBlock(8, 8, 3)).eval()
    x = torch.randn(2, 8, 9, 9)
    expected = copy.deepcopy(block).double()(x.double())
    for _ in range(3):
        block.remove_branches(["1x1", "1x1_kxk"])
        block.add_branches(["1x1", "1x1_kxk"])
    apart = (block(x) - expected).detach().abs().max()
    assert float(apart) < 32 * torch.finfo(torch.float32).eps * float(expected.detach().abs().max())


# --- errors


@pytest.mark.parametrize(
    ("arguments", "branches", "message"),
    [
        ((4, 4, 3), ("1x1",), "branches must have 'kxk'"),
        ((4, 4, 3), ("kxk", "3x3"), "branches must be any of 1x1, .*, id once each for this geometry, got .*3x3"),
        ((4, 4, 3), ("kxk", "kxk"), "once each"),
        ((4, 6, 3), ("kxk", "id"), r"branches must be any of .*kx1 once each"),
        ((4, 4, 1), ("kxk", "1x1"), "branches must be any of 1x1_kxk, kxk, id once each"),
    ],
)
def test_bad_branches(arguments, branches, message):
    with pytest.raises(ValueError, match=message):
        DyRepBlock(*arguments, branches=branches)


def test_bad_changes():
    block = DyRepBlock(4, 6, 3, branches=("kxk", "1x1"))
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    with pytest.raises(ValueError, match="has the branch 1x1 already"):
        block.add_branches(["1xk", "1x1"])
    with pytest.raises(ValueError, match=r"branches must be any of .*, got \('id',\)"):
        block.add_branches(["id"])
    with pytest.raises(ValueError, match="'kxk' takes what the others leave"):
        block.remove_branches(["1x1", "kxk"])
    with pytest.raises(ValueError, match="there is no branch 'kx1', only 1x1, kxk"):
        block.remove_branches(["1x1", "kx1"])
    nn.init.zeros_(block.dense_bn.weight)
    with pytest.raises(ValueError, match="`dense_bn` scales a channel by 0"):
        block.remove_branches(["1x1"])
    nn.init.ones_(block.dense_bn.weight)
    assert {name: tensor.tolist() for name, tensor in block.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }


def test_bad_options():
    with pytest.raises(ValueError, match="border must be one of exact, released, got 'none'"):
        DyRepBlock(4, 4, border="none")
    with pytest.raises(ValueError, match=r"internal_channels \(=3\) must be a positive multiple of groups \(=2\)"):
        DyRepBlock(4, 4, groups=2, internal_channels=3)
