"""ODBBlock: gates and their gradients, masks, strides, and what is kept after a search."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern.nn import ODBBlock
from repkern.nn.seven_branches import SEVEN_BRANCHES

F64 = {"dtype": torch.float64}
CASES = ((6, 6, 3, 3, 1, None, 1, "zeros"), (4, 6, 2, 5, 2, (0, 4), (1, 2), "zeros"), (4, 4, 4, 3, 1, 2, 3, "zeros"))


def branch_map(block, name, x, explicit):
    if name == "1x1_avg":
        if block.avg is None:
            return explicit.pooled(block, explicit.padded(block, x))
        z = explicit.one_by_one(block, x, block.avg.weight)
        return explicit.pooled(block, explicit.normed_and_padded(block, z, block.avg_inner_bn))
    if name == "1x1_kxk":
        z = explicit.padded(block, x)
        if block.reduce is not None:
            z = explicit.one_by_one(block, x, block.reduce.kernel())
            z = explicit.normed_and_padded(block, z, block.reduce_bn)
        return explicit.expanded(block, z, block.expand.weight)
    if name == "id":
        return x
    layers = {"kxk": block.dense, "1x1": block.pointwise, "1xk": block.horizontal, "kx1": block.vertical}
    return explicit.convolved(block, x, layers[name].weight)


def gated_sum(explicit, gates=None, mask=None):
    def literal(block, x):
        factors = {"id": 1.0}
        for at, name in enumerate(block.gated_branches):
            if mask is None or mask[at]:
                factors[name] = 1.0 if gates is None else gates[at]
        maps = {name: branch_map(block, name, x, explicit) for name in block.branches if name in factors}
        y = sum(factors[name] * block.last_norm(name)(map) for name, map in maps.items())
        return y if block.activation is None else block.activation(y)

    return literal


@pytest.mark.parametrize("border", ["exact", "released"])
def test_a_step_without_gates_equals_the_branches_one_by_one(border, explicit, randomize, same):
    for geometry in (*explicit.GEOMETRIES, *CASES):
        block = randomize(explicit.make(ODBBlock, geometry, border=border, activation=nn.ReLU()))
        explicit.check_step(block.train(), gated_sum(explicit), same, f"train {geometry}")
        explicit.check_fused(block, same, 13)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("mask", [None, (True, False, True, False, False, True), (False,) * 6])
def test_gates(mask, recompute, training, explicit, randomize, same):
    block = randomize(ODBBlock(4, 4, 3, recompute=recompute, activation=nn.SiLU(), **F64)).train(training)
    twin = copy.deepcopy(block)
    assert block.gated_branches == SEVEN_BRANCHES[:-1]
    gates, others = (torch.linspace(-0.5, 1.5, 6, requires_grad=True, **F64) for _ in range(2))
    x = explicit.images(4)
    output, expected = block(x, gates, mask), gated_sum(explicit, others, mask)(twin, x)
    same(output, expected, 1e-12, "output")
    toward = torch.randn_like(output)
    (output * toward).sum().backward()
    (expected * toward).sum().backward()
    if mask == (False,) * 6:
        assert gates.grad is None
    else:
        same(gates.grad, others.grad, 1e-11, "gradient of the gates")
    for (name, one), other in zip(block.named_parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            largest = max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
            assert float((one.grad - other.grad).abs().max()) <= 1e-11 * largest, name
    for (name, one), other in zip(block.named_buffers(), twin.buffers(), strict=True):
        same(one.double() + 1, other.double() + 1, 1e-13, name)
    left_out = [name for at, name in enumerate(block.gated_branches) if mask is not None and not mask[at]]
    assert all(int(block.last_norm(name).num_batches_tracked) == 1 for name in left_out), "ran although masked"


def test_gates_with_norms_that_have_no_parameters(explicit, same):
    block = ODBBlock(4, 4, 3, branches=("1x1", "kxk"), **F64)
    block.dense_bn = nn.BatchNorm2d(4, affine=False).double()
    x = explicit.images(4)
    gates = torch.tensor([0.5, -2.0], requires_grad=True, **F64)
    expected = 0.5 * block.pointwise_bn(block.pointwise(x)) - 2 * block.dense_bn(block.dense(x))
    same(block(x, gates), expected, 1e-12, "output")
    block(x, gates).square().sum().backward()
    assert gates.grad.all()


def test_half_precision_gates_stay_single():
    block = ODBBlock(4, 4, 3, dtype=torch.bfloat16)
    gates = torch.ones(6, requires_grad=True)
    output = block(torch.randn(2, 4, 5, 5, dtype=torch.bfloat16), gates)
    assert output.dtype is torch.bfloat16
    output.float().square().mean().backward()
    assert gates.grad.dtype is torch.float32


@pytest.mark.parametrize("stride", [1, 2])
def test_without_the_1x1_where_the_stride_is_not_1(stride, explicit, randomize, same):
    block = randomize(ODBBlock(4, 6, 3, stride, padding=2, strided_reduce=False, **F64)).train()
    assert (block.reduce is None) == (block.reduce_bn is None) == (stride == 2)
    explicit.check_step(block, gated_sum(explicit), same)
    explicit.check_fused(block, same)


def test_keep_branches(randomize, same):
    block = randomize(ODBBlock(4, 4, 3, **F64)).eval()
    x = torch.randn(2, 4, 7, 7, **F64)
    chosen = [name in ("1x1", "1x1_avg", "kx1") for name in block.gated_branches]
    expected = block(x, torch.ones(6, **F64), chosen)
    block.keep_branches(["kx1", "id", "1x1_avg", "1x1"])
    assert block.branches == ("1x1", "1x1_avg", "kx1", "id")
    same(block(x), expected, 1e-14, "kept")
    same(block.fuse()(x), expected, 1e-12, "fused")
    with pytest.raises(ValueError, match="without the branch 'kxk' cannot start as a given convolution"):
        block.set_equivalent_kernel_bias(torch.zeros(4, 4, 3, 3), None)


def test_compiled_with_gates(randomize, same):
    block = randomize(ODBBlock(4, 4, 3, branches=("1x1", "1x1_avg", "kxk", "id"), **F64)).train()
    twin = copy.deepcopy(block)
    x, mask = torch.randn(2, 4, 5, 5, **F64), (True, False, True)
    gates, others = (torch.tensor([0.3, 1.0, 0.7], requires_grad=True, **F64) for _ in range(2))
    output = torch.compile(block, fullgraph=True, backend="aot_eager")(x, gates, mask)
    expected = twin(x, others, mask)
    same(output, expected, 1e-12, "output")
    toward = functional.normalize(torch.randn_like(output).flatten(), dim=0).view_as(output)
    (output * toward).sum().backward()
    (expected * toward).sum().backward()
    same(gates.grad, others.grad, 1e-10, "gradient of the gates")


def test_errors():
    block = ODBBlock(4, 6, 3, stride=2, branches=("kxk", "1x1", "1x1_avg"))
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match=r"gates must be \[3\] for 1x1, 1x1_avg, kxk, got \(4,\)"):
        block(x, torch.ones(4))
    with pytest.raises(ValueError, match="mask must have 3 entries for 1x1, 1x1_avg, kxk, got 2"):
        block(x, None, [True, True])
    with pytest.raises(TypeError, match="mask must be bools on the host, got a tensor"):
        block(x, None, torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="mask leaves no branch to run"):
        block(x, None, [False] * 3)
    with pytest.raises(ValueError, match=r"\[\(N,\) 4, H, W\], got \(2, 3, 5, 5\)"):
        block(x[:, :3])
    with pytest.raises(ValueError, match=r"names must be some of 1x1, 1x1_avg, kxk, got \('id',\)"):
        block.keep_branches(["id"])
    with pytest.raises(ValueError, match="at least one branch, got none"):
        ODBBlock(4, 4, branches=())
    with pytest.raises(ValueError, match="internal_channels is in_channels, got 8"):
        ODBBlock(4, 4, 3, 2, internal_channels=8, strided_reduce=False)
