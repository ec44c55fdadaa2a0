"""DiverseBranchBlock: its branches one by one, the borders around inner norms, options, and what is kept."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from repkern.nn import DiverseBranchBlock

F64 = {"dtype": torch.float64}
CASES = (
    (6, 6, 3, 3, 1, None, 1, "zeros"),
    (4, 6, 2, 5, 2, (0, 4), (1, 2), "zeros"),
    (4, 4, 4, 3, 1, 2, 3, "zeros"),
    (4, 8, 4, 3, 1, 1, 1, "reflect"),
    (6, 3, 3, 3, (1, 2), 0, 1, "zeros"),
    # kernels with more values than the maps: the map is scaled instead
    (4, 12, 1, 7, 1, 2, 1, "zeros"),
    (4, 24, 2, 7, 2, 4, 1, "reflect"),
)
DEEP = CASES[-2]


def kernel_of(reduce):
    return reduce.kernel() if hasattr(reduce, "kernel") else reduce.weight


def four_branches(explicit):
    def literal(block, x):
        y = block.dense_bn(explicit.convolved(block, x, block.dense.weight))
        if block.pointwise is not None:
            y = y + block.pointwise_bn(explicit.convolved(block, x, block.pointwise.weight))
        if block.avg is not None:
            z = explicit.one_by_one(block, x, block.avg.weight)
            y = y + block.avg_bn(explicit.pooled(block, explicit.normed_and_padded(block, z, block.avg_inner_bn)))
        elif block.avg_bn is not None:
            y = y + block.avg_bn(explicit.pooled(block, explicit.padded(block, x)))
        z = explicit.one_by_one(block, x, kernel_of(block.reduce))
        z = explicit.normed_and_padded(block, z, block.reduce_bn)
        y = y + block.expand_bn(explicit.expanded(block, z, block.expand.weight))
        return y if block.activation is None else block.activation(y)

    return literal


@pytest.mark.parametrize("border", ["exact", "released"])
def test_a_step_equals_the_branches_one_by_one(border, explicit, randomize, same):
    for geometry in (*explicit.GEOMETRIES, *CASES):
        block = randomize(explicit.make(DiverseBranchBlock, geometry, border=border, activation=nn.ReLU()))
        ci, co, groups, k, *_ = geometry
        depthwise = groups == ci == co
        assert (block.pointwise is None) == (depthwise or k == 1)
        assert (block.avg is None) == (depthwise or k == 1)
        assert (block.avg_bn is None) == (k == 1)
        assert block.internal_channels == (ci if groups < co else 2 * ci)
        explicit.check_step(block.train(), four_branches(explicit), same, f"train {geometry}")
        explicit.check_step(block.eval(), four_branches(explicit), same, f"eval {geometry}")
        explicit.check_fused(block, same, 13)


def test_frozen_norms_inside_a_training_block(explicit, randomize, same):
    """The border's constant reaches the output when the outer norm does not take it out."""
    for frozen in (["expand_bn", "avg_bn"], ["reduce_bn", "avg_inner_bn"], ["dense_bn"]):
        block = randomize(DiverseBranchBlock(4, 6, 3, **F64)).train()
        for name in frozen:
            block.get_submodule(name).eval()
        explicit.check_step(block, four_branches(explicit), same, f"frozen {frozen}")


def test_exact_borders_make_training_one_convolution(explicit, randomize, same):
    """With momentum 1 the running statistics are those of the batch, up to Bessel's correction."""
    x = explicit.images(4)
    for border in ("exact", "released"):
        block = randomize(DiverseBranchBlock(4, 6, 3, padding=2, border=border, **F64)).train()
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        block(x)
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.0
        trained = block(x)
        for name, norm in block.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                size = 3 * 11 * 13 if "inner" in name or "reduce" in name else trained[:, 0].numel()
                norm.running_var.mul_((size - 1) / size)
        apart = float((block.eval()(x) - trained).detach().abs().max())
        # The released border has the corrected variance in it.
        assert apart < 1e-12 if border == "exact" else 1e-6 < apart < 0.1, border


@pytest.mark.parametrize("geometry", [(4, 6, 1, 3, 1, 1, 1, "zeros"), DEEP])
@pytest.mark.parametrize("border", ["exact", "released"])
@pytest.mark.parametrize(("recompute", "alive"), [("none", 6), ("cheap", 2)])
def test_recompute_drops_the_cheap_maps_and_changes_nothing(
    recompute, alive, border, geometry, explicit, randomize, same, monkeypatch
):
    block = explicit.make(DiverseBranchBlock, geometry, recompute=recompute, border=border, activation=nn.ReLU())
    block = randomize(block).train()
    explicit.check_step(block, four_branches(explicit), same, recompute)
    maps = []

    def watched(*args, **options):
        output = conv2d(*args, **options)
        maps.append(StorageWeakRef(output.untyped_storage()))
        return output

    conv2d = functional.conv2d
    monkeypatch.setattr(functional, "conv2d", watched)
    output = block(explicit.images(4).requires_grad_())
    # KxK, 1x1, 1x1 and its average, 1x1 and its KxK: with "cheap" the two KxK maps are what is left.
    assert [storage.expired() for storage in maps].count(False) == alive
    assert len(maps) == 6
    output.sum().backward()
    assert len(maps) == (6 if recompute == "none" else 10)


def test_compiled(explicit, randomize, same):
    block = randomize(explicit.make(DiverseBranchBlock, (4, 6, 2, 3, 2, 0, 2, "zeros"), activation=nn.ReLU()))
    explicit.check_compiles(block, same)


@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_autocast(recompute, randomize, same):
    block = randomize(DiverseBranchBlock(4, 6, 3, recompute=recompute)).train()
    reference = copy.deepcopy(block).double()
    x = torch.randn(4, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        output = block(x)
    assert output.dtype in (torch.bfloat16, torch.float32)
    wanted = reference(x.double())
    same(output.double(), wanted, 32 * torch.finfo(torch.bfloat16).eps, "autocast")
    output.float().square().mean().backward()
    wanted.square().mean().backward()
    for (name, one), other in zip(block.named_parameters(), reference.parameters(), strict=True):
        assert one.grad.dtype is torch.float32, name
        if float(other.grad.abs().max()) > 1e-3:
            assert float((one.grad - other.grad).norm() / other.grad.norm()) < 0.1, name


def test_single_init_starts_as_the_kxk_branch(randomize, same):
    block = DiverseBranchBlock(4, 6, 3, single_init=True, **F64).eval()
    for norm in (block.dense_bn, block.reduce_bn, block.avg_inner_bn):
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 7, 7, **F64)
    same(block(x), block.dense_bn(block.dense(x)), 1e-14, "output")


def test_the_first_1x1_is_an_identity_unless_told_otherwise():
    x = torch.randn(2, 4, 5, 5)
    block = DiverseBranchBlock(4, 6)
    assert torch.equal(block.reduce(x), x)
    assert not block.reduce.weight.any()
    assert not hasattr(DiverseBranchBlock(4, 6, identity_reduce=False).reduce, "kernel")
    assert not hasattr(DiverseBranchBlock(4, 6, internal_channels=8).reduce, "kernel")
    with torch.device("meta"):
        late = DiverseBranchBlock(4, 6)
    late.to_empty(device="cpu").reduce.reset_parameters()
    assert torch.equal(late.reduce(x), x)
    doubled = DiverseBranchBlock(4, 6, groups=2, internal_channels=8, identity_reduce=True)
    assert torch.equal(doubled.reduce(x), x[:, [0, 1, 0, 1, 2, 3, 2, 3]])
    assert set(doubled.state_dict()) == set(DiverseBranchBlock(4, 6, identity_reduce=False).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"border": "zero"}, "border must be one of exact, released, got 'zero'"),
        ({"recompute": "all"}, "recompute must be one of none, cheap, got 'all'"),
        (
            {"groups": 2, "internal_channels": 5},
            r"internal_channels \(=5\) must .* multiple of groups \(=2\)",
        ),
        ({"internal_channels": 0}, r"internal_channels \(=0\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DiverseBranchBlock(4, 6, **options)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[\(N,\) 4, H, W\], got \(1, 3, 5, 5\)"):
        DiverseBranchBlock(4, 6)(torch.zeros(1, 3, 5, 5))


def test_released_borders_need_running_statistics():
    block = DiverseBranchBlock(4, 6, border="released")
    block.reduce_bn = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="border='released' needs inner norms with running statistics"):
        block(torch.randn(2, 4, 5, 5))


def test_a_kernel_before_a_norm_that_scales_by_zero():
    block = DiverseBranchBlock(4, 6)
    block.dense_bn.weight.data[2] = 0
    with pytest.raises(ValueError, match="`dense_bn` scales a channel by 0"):
        block.set_equivalent_kernel_bias(torch.zeros(6, 4, 3, 3), None)
