"""torch.func and forward-mode AD: the differentiable ops against loops and against plain torch in float64."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from repkern.ops import (
    OPS,
    Norm,
    SqueezeBranches,
    branch_norm_add,
    branch_norm_statistics,
    compose_sequential,
    direct_conv2d,
    grad_mult_sgd_,
    orepa_squeeze,
    orepa_squeeze_many,
    use_backend,
)

D = torch.float64
# torch's own decompositions for forward mode are still scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def _squeeze(origin, avg, prior, reduce, expand, depthwise, project, scale):
    return orepa_squeeze(origin, avg, prior, None, reduce, expand, depthwise, project, scale, identity_reduce=True)


def _many(origin, avg, other):
    layers = [SqueezeBranches(origin, avg), SqueezeBranches(other, scale=origin[:1, :, 0, 0])]
    return torch.cat([kernel.flatten() for kernel in orepa_squeeze_many(layers)])


def _norms(x, y, weight, bias):
    return branch_norm_add([x, y, x], [Norm(weight, bias), None, Norm(mean=weight * 0, var=weight * 0 + 1)], "silu")[0]


def _statistics(x, y):
    return torch.cat(branch_norm_statistics([x, y]))


CASES = {
    "compose": (compose_sequential, [(3, 2, 3, 3), (4, 3, 2, 2)]),
    "squeeze": (_squeeze, [(4, 3, 3, 3), (4, 3), (4, 3), (2, 3), (4, 2, 3, 3), (6, 3, 3), (4, 6), (5, 4)]),
    "squeeze_many": (_many, [(3, 3, 3, 3), (3, 3), (3, 2, 1, 1)]),
    "norms": (_norms, [(2, 3, 2, 3), (2, 3, 2, 3), (3,), (3,)]),
    "statistics": (_statistics, [(2, 3, 2, 3), (2, 3, 2, 3)]),
}
EACH = pytest.mark.parametrize(("function", "shapes"), CASES.values(), ids=CASES)


def inputs(shapes, *batch):
    return tuple(torch.randn(*batch, *shape, dtype=D) for shape in shapes)


def loss_of(function):
    def loss(*args):
        out = function(*args)
        return (out * torch.linspace(-1, 2, out.numel(), dtype=D).view(out.shape)).square().sum()

    return loss


def close(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def by_autograd(function, args):
    leaves = [t.clone().requires_grad_() for t in args]
    return torch.autograd.grad(function(*leaves), leaves)


@EACH
def test_grad(function, shapes):
    args, loss = inputs(shapes), loss_of(function)
    close(grad(loss, tuple(range(len(args))))(*args), by_autograd(loss, args))


@EACH
def test_vmap_is_the_loop(function, shapes):
    args = inputs(shapes, 3)
    assert torch.equal(vmap(function)(*args), torch.stack([function(*each) for each in zip(*args, strict=True)]))
    shared = (args[0], *(t[0] for t in args[1:]))
    dims = (0, *(None,) * (len(args) - 1))
    wanted = torch.stack([function(first, *shared[1:]) for first in args[0]])
    assert torch.equal(vmap(function, dims)(*shared), wanted)
    last = (args[0].movedim(0, -1), *shared[1:])
    assert torch.equal(vmap(function, (-1, *dims[1:]), out_dims=-1)(*last).movedim(-1, 0), wanted)


@EACH
def test_per_sample_gradients(function, shapes):
    args, loss = inputs(shapes, 3), loss_of(function)
    got = vmap(grad(loss, tuple(range(len(args)))))(*args)
    wanted = [by_autograd(loss, each) for each in zip(*args, strict=True)]
    close(got, [torch.stack(each) for each in zip(*wanted, strict=True)])
    first = vmap(grad(loss), (0, *(None,) * (len(args) - 1)))(args[0], *(t[1] for t in args[1:]))
    close(first, [by_autograd(loss, (t, *(t[1] for t in args[1:])))[0] for t in args[0]])


@EACH
def test_the_gradient_of_a_batch(function, shapes):
    args, loss = inputs(shapes, 2), loss_of(function)
    got = grad(lambda *a: vmap(loss)(*a).sum(), tuple(range(len(args))))(*args)
    wanted = [by_autograd(loss, each) for each in zip(*args, strict=True)]
    close(got, [torch.stack(each) for each in zip(*wanted, strict=True)])


@EACH
def test_jacobians_forwards_and_backwards(function, shapes):
    args = inputs(shapes)
    numbers = tuple(range(len(args)))
    wanted = torch.autograd.functional.jacobian(lambda *a: function(*a), args)
    close(jacrev(function, numbers)(*args), wanted)
    close(jacfwd(function, numbers)(*args), wanted)


def test_second_derivatives():
    first, second = inputs(CASES["compose"][1])
    loss = loss_of(compose_sequential)
    wanted = torch.autograd.functional.hessian(lambda a: loss(a, second), first)
    close([hessian(loss)(first, second)], [wanted])
    close([jacrev(jacrev(loss))(first, second)], [wanted])


@EACH
def test_forward_mode(function, shapes):
    args, directions = inputs(shapes), inputs(shapes)
    jacobians = torch.autograd.functional.jacobian(lambda *a: function(*a), args)
    out = function(*args)
    wanted = sum(
        (j.flatten(out.dim()) @ t.flatten()).reshape(out.shape) for j, t in zip(jacobians, directions, strict=True)
    )
    close([jvp(function, args, directions)[1]], [wanted])
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(args, directions, strict=True)]
        close([torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent], [wanted])


class Stacked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(3, 2, 3, 3, dtype=D))
        self.second = torch.nn.Parameter(torch.randn(4, 3, 3, 3, dtype=D))

    def forward(self, x):
        return torch.conv2d(x, compose_sequential(self.first, self.second))


def test_an_ensemble_of_stacked_states():
    models, x = [Stacked() for _ in range(3)], torch.randn(2, 2, 7, 7, dtype=D)
    params, buffers = stack_module_state(models)
    skeleton = models[0]
    got = vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(params, buffers)
    close(got, [model(x) for model in models])
    per_model = vmap(grad(lambda p: functional_call(skeleton, p, (x,)).square().sum()))(params)
    for at, model in enumerate(models):
        model(x).square().sum().backward()
        close([per_model["first"][at], per_model["second"][at]], [model.first.grad, model.second.grad])


def test_batched_vectors_of_an_ordinary_backward():
    args = [t.requires_grad_() for t in inputs(CASES["compose"][1])]
    out = compose_sequential(*args)
    outer = torch.randn(3, *out.shape, dtype=D)
    got = vmap(lambda v: torch.autograd.grad(out, args[0], v, retain_graph=True)[0])(outer)
    close(got, [torch.autograd.grad(out, args[0], v, retain_graph=True)[0] for v in outer])


def test_ops_without_a_gradient_refuse_a_forward_one():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    with pytest.raises(RuntimeError, match="has no gradient"):
        jvp(lambda x: direct_conv2d(x, weight), (x,), (x,))
    with pytest.raises(RuntimeError, match="has no gradient"):
        grad(lambda x: direct_conv2d(x, weight).sum())(x)


def test_in_place_steps_refuse_vmap():
    def step(param):
        grad_mult_sgd_([param], [torch.ones(3)], None, None, lr=0.1, weight_decay=0.0)
        return param

    with pytest.raises(RuntimeError, match="cannot run under"):
        vmap(step)(torch.ones(2, 3))


@pytest.mark.parametrize("backend", [b for b in ("reference", "cpu") if b in OPS["compose_sequential"].backends])
def test_inference_under_vmap_uses_the_backend(backend):
    x, weight = torch.randn(2, 1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    with use_backend(backend), torch.no_grad():
        assert torch.equal(
            vmap(lambda x: direct_conv2d(x, weight))(x), torch.stack([direct_conv2d(each, weight) for each in x])
        )
