"""The public functions: torch's BatchNorms, their sum and the activation, in one op."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern import _native, testing
from repkern.ops import (
    OPS,
    Norm,
    branch_norm_add,
    branch_norm_add_backward,
    branch_norm_statistics,
    branch_norm_sums,
    use_backend,
)
from repkern.ops.branch_norm_add import ACTIVATIONS
from repkern.testing.inputs import map_tensors

needs_cpu = pytest.mark.skipif(_native.why_missing("cpu") is not None, reason="no native module")
STATISTICS = {"mean", "var", "sums", "count", "grad_mean", "grad_var"}


def problem(shape=(3, 5, 4, 6), dtype=torch.float64, branches=3):
    maps = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(branches)]
    weights, biases = (
        [torch.randn(shape[1], dtype=dtype, requires_grad=True) for _ in range(branches)] for _ in range(2)
    )
    return maps, weights, biases


def as_list(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def by_torch(maps, norms, activation):
    total = 0
    for y, norm in zip(maps, norms, strict=True):
        if norm is not None:
            own = norm.mean is None
            y = functional.batch_norm(y, norm.mean, norm.var, norm.weight, norm.bias, own, 0.0, norm.eps)
        total = total + y
    return total if activation == "none" else getattr(functional, activation)(total)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_torch(activation, layout):
    maps, weights, biases = problem()
    maps = [y.detach().contiguous(memory_format=layout).requires_grad_() for y in maps]
    given = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    norms = [Norm(weights[0], biases[0]), Norm(weights[1], biases[1], *given, eps=1e-3), None, Norm()]
    branches = [*maps, maps[0]]  # one map in two branches
    out, mean, var = branch_norm_add(branches, norms, activation)
    wanted = by_torch(branches, norms, activation)
    assert out.is_contiguous(memory_format=layout)
    testing.assert_close(out, wanted, 1e-13 * float(wanted.detach().abs().max()))
    assert mean.shape == var.shape == (2, 5)
    assert not mean.requires_grad
    assert not var.requires_grad
    testing.assert_close(var[0], maps[0].var((0, 2, 3), correction=0), 1e-14)
    grad, leaves = torch.randn_like(out), [*maps, *weights[:2], *biases[:2]]
    for got, exact in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        testing.assert_close(got, exact, 1e-12 * float(exact.abs().max()))


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_gradcheck(activation):
    maps, weights, biases = problem((2, 2, 2, 2))

    def call(*leaves):
        norms = [Norm(leaves[3], leaves[5]), Norm(leaves[4], leaves[6]), None]
        return branch_norm_add(leaves[:3], norms, activation)[0]

    leaves = (*maps, *weights[:2], *biases[:2])
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_statistics_gradcheck():
    maps, _, _ = problem((2, 2, 2, 3), branches=2)
    assert torch.autograd.gradcheck(lambda *y: branch_norm_statistics(y), maps)
    assert torch.autograd.gradgradcheck(lambda *y: branch_norm_statistics(y), maps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [pytest.param(t, id=str(t)) for t in testing.targets() if t.backend != "triton"])
@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS.values() if op.stem == "branch_norm_add"])
def test_half_precision(op, target, dtype):
    """Maps and parameters in half precision, or only the maps; statistics and sums in float32."""
    names = [argument.name for argument in op.overload._schema.arguments]
    for sample in testing.samples_of(op)[:10]:
        for wide_parameters in (False, True):
            wide = STATISTICS | ({"weights", "biases", "means", "vars"} if wide_parameters else set())
            args = tuple(
                map_tensors(arg, lambda t, kept=name in wide: t.to(target.device, torch.float32 if kept else dtype))
                for name, arg in zip(names, sample.args, strict=True)
            )
            with target.active():
                outputs = as_list(op(*args))
            exact_args = map_tensors(args, testing.as_float)
            wanted = as_list(op.implementation("reference")(*exact_args))
            rounded = testing.Sample(sample.name, exact_args, (), bounds=sample.bounds)
            bounds = testing.error_bounds(op, rounded, dtype)
            for number, (got, exact, bound) in enumerate(zip(outputs, wanted, bounds, strict=True)):
                testing.assert_close(got, exact.cpu(), bound.cpu(), f"{sample}, output {number}")


@pytest.mark.parametrize("target", [pytest.param(t, id=str(t)) for t in testing.targets()])
def test_large_mean_keeps_its_variance(target):
    """E[y^2] - E[y]^2 in float32 would be off by more than the variance itself."""
    y = (torch.randn(4, 3, 9, 11) + 10000).to(target.device)
    with target.active():
        _, mean, var = branch_norm_add([y], [Norm()])
    exact = y.double().cpu()
    testing.assert_close(mean[0], exact.mean((0, 2, 3)), 1e-3)
    testing.assert_close(var[0], exact.var((0, 2, 3), correction=0), 1e-4)


@needs_cpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(7, 3, 40, 41), (2, 50, 9, 9), (9, 40, 64, 65)])
def test_same_bits_for_any_number_of_threads(shape, layout):
    maps = [torch.randn(shape).contiguous(memory_format=layout) for _ in range(2)]
    norms = [Norm(torch.randn(shape[1]), torch.randn(shape[1])), Norm()]
    grad = torch.randn(shape).contiguous(memory_format=layout)

    def results():
        out, mean, var = branch_norm_add(maps, norms, "relu")
        grads, weight, bias = branch_norm_add_backward(grad, maps, norms, mean, var, "relu")
        return [out, mean, var, *grads, weight, bias]

    before, found = torch.get_num_threads(), []
    try:
        with use_backend("cpu"):
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(results())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("target", [pytest.param(t, id=str(t)) for t in testing.targets()])
def test_the_backward_sees_the_forwards_side_of_the_corner(target):
    """Many sums close to zero, where another order of operations would flip a ReLU."""
    y = torch.randn(2, 4, 8, 8).to(target.device)
    norms = [
        Norm(),
        Norm(torch.full((4,), -1.0, device=target.device)),
        Norm(torch.full((4,), 1e-6, device=target.device)),
    ]
    with target.active():
        out, mean, var = branch_norm_add([y, y + 3, y * 2], norms, "relu")
        ones = torch.ones_like(out)
        zeros = var.new_zeros(4, 4)
        count = var.new_full((1,), 128)
        # With sums of zero the gradient of the first branch is scale * dz.
        args = ([y, y + 3, y * 2], norms, mean, var, "relu")
        grads, _, _ = branch_norm_add_backward(ones, *args, sums=zeros, count=count)
    assert torch.equal(grads[0] != 0, out > 0)


def test_two_halves_of_a_batch_equal_the_whole():
    """What synchronized norms do with the ops, without processes."""
    maps, weights, biases = problem((4, 3, 5, 5), branches=2)
    norms = [Norm(w, b) for w, b in zip(weights, biases, strict=True)]
    out, mean, var = branch_norm_add(maps, norms, "relu")
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(out, [*maps, *weights, *biases], grad)
    given = [norm._replace(mean=m, var=v) for norm, m, v in zip(norms, mean, var, strict=True)]
    halves = [([y.detach()[part] for y in maps], grad[part]) for part in (slice(0, 2), slice(2, 4))]
    sums = [branch_norm_sums(g, y, norms, mean, var, "relu") for y, g in halves]
    count = torch.tensor([100.0], dtype=torch.float64)
    for part, (y, g) in zip((slice(0, 2), slice(2, 4)), halves, strict=True):
        testing.assert_close(branch_norm_add(y, given, "relu")[0], out[part], 1e-13)
        grads, _, _ = branch_norm_add_backward(
            g, y, norms, mean, var, "relu", sums=(sums[0] + sums[1]).detach(), count=count
        )
        for got, exact in zip(grads, wanted[:2], strict=True):
            testing.assert_close(got, exact[part], 1e-12)
    testing.assert_close((sums[0] + sums[1])[1:], torch.stack(wanted[2:4]), 1e-12)
    testing.assert_close((sums[0] + sums[1])[0], wanted[4], 1e-12)


def test_nan_goes_through_every_activation():
    for activation in ACTIVATIONS:
        y = torch.randn(2, 3, 4, 4)
        y[1, 2, 3, 0] = torch.nan
        out, _, var = branch_norm_add([y, torch.randn_like(y)], [Norm(), None], activation)
        assert bool(out[:, 2].isnan().all())
        assert not bool(out[:, :2].isnan().any())
        assert bool(var[0, 2].isnan())


def test_far_ends_of_silu_and_hardswish():
    y = torch.tensor([-1e4, -100.0, -88.0, -3.0, 0.0, 3.0, 100.0, 1e4]).view(1, 1, 1, 8).requires_grad_()
    for activation in ("silu", "hardswish"):
        out = branch_norm_add([y], [None], activation)[0]
        exact = getattr(functional, activation)(y.detach().double())
        testing.assert_close(out, exact, 1e-6 * exact.abs() + 1e-6)
        (grad,) = torch.autograd.grad(out.sum(), y)
        wanted = torch.autograd.grad(getattr(functional, activation)(y).sum(), y)[0]
        testing.assert_close(grad, wanted, 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fullgraph_compile():
    maps, weights, biases = problem(dtype=torch.float32, branches=2)

    def call(*leaves):
        return branch_norm_add(leaves[:2], [Norm(leaves[2], leaves[3]), None], "relu")[0].square().sum()

    leaves = (*maps, weights[0], biases[0])
    compiled = torch.compile(call, fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(got, torch.autograd.grad(call(*leaves), leaves), strict=True):
        testing.assert_close(a, b, 1e-5 * float(b.abs().max()))


Y = torch.zeros(2, 3, 4, 4)
ONE = torch.ones(3)


@pytest.mark.parametrize(
    ("branches", "norms", "activation", "error", "match"),
    [
        ([], [], "relu", ValueError, r"1 to 16 branches are needed, got 0"),
        ([Y] * 17, [None] * 17, "relu", ValueError, r"1 to 16 branches are needed, got 17"),
        ([Y], [None, None], "relu", ValueError, r"got 2 for 1 branches"),
        ([Y], [None], "tanh", ValueError, r"must be one of none, relu, relu6, silu, hardswish, got 'tanh'"),
        ([Y, Y[:, :2]], [None, None], "relu", ValueError, r"`branches\[1\]` must have shape \(2, 3, 4, 4\), got"),
        ([Y[0]], [None], "relu", ValueError, r"\[N, C, H, W\], got \(3, 4, 4\)"),
        ([Y[:0]], [Norm()], "relu", ValueError, r"must not be empty, got shape \(0, 3, 4, 4\)"),
        ([Y[:1, :, :1, :1]], [Norm()], "relu", ValueError, r"Expected more than 1 value per channel"),
        ([Y], [Norm(ONE[:2])], "relu", ValueError, r"`weights\[0\]` must have shape \(3,\), got \(2,\)"),
        ([Y], [Norm(ONE, mean=ONE)], "relu", ValueError, r"only one of `mean` and `var`"),
        ([Y, Y.double()], [None, None], "relu", TypeError, r"one dtype"),
        ([Y], [Norm(ONE.double(), ONE.double())], "relu", TypeError, r"one dtype, or parameters be torch.float32"),
        ([Y], [Norm(ONE.long())], "relu", TypeError, r"must be one of float32"),
        ([Y.long()], [None], "relu", TypeError, r"must be one of float32"),
    ],
)
def test_bad_calls(branches, norms, activation, error, match):
    with pytest.raises(error, match=match):
        branch_norm_add(branches, norms, activation)


def test_one_value_with_given_statistics_is_fine():
    y = torch.randn(1, 3, 1, 1)
    out, mean, _ = branch_norm_add([y], [Norm(mean=ONE, var=ONE)])
    testing.assert_close(out, (y.double() - 1) / (1 + 1e-5) ** 0.5, 1e-6)
    assert mean.shape == (0, 3)


def test_a_training_step_is_that_of_torch_modules():
    norms = [nn.BatchNorm2d(6) for _ in range(2)]
    maps = [torch.randn(4, 6, 5, 5, requires_grad=True) for _ in range(2)]
    out = branch_norm_add(maps, [Norm(n.weight, n.bias, eps=n.eps) for n in norms], "relu")[0]
    wanted = functional.relu(norms[0](maps[0]) + norms[1](maps[1]))
    testing.assert_close(out, wanted, 1e-5)
    grad = torch.randn_like(out)
    leaves = [*maps, *(p for n in norms for p in n.parameters())]
    for got, exact in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        testing.assert_close(got, exact, 1e-4)
