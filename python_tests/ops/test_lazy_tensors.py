"""Tensors whose memory does not hold their values: a pending sign, and zeros that have no memory."""

import copy

import pytest
import torch

from repkern import testing
from repkern.ops import OPS, ChannelMultiplier, Norm, branch_norm_add, compose_sequential, grad_mult_sgd_, orepa_squeeze
from repkern.optim import RepAdamW, RepSGD
from repkern.testing.inputs import map_tensors

RETURNING = [op for op in OPS.values() if not op.mutates]
TARGETS = [pytest.param(target, id=str(target)) for target in testing.targets()]


def negated(tensor):
    """The same values, kept in memory with the other sign; contiguous."""
    lazy = torch._neg_view(-tensor)
    assert lazy.is_neg()
    return lazy


def no_memory(tensor):
    return torch._efficientzerotensor(tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)


def as_list(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def call_all_ways(op, args):
    """Through the dispatcher, and as autograd formulas and deployed networks call it."""
    with torch.no_grad():
        yield as_list(op(*args))
        yield as_list(op.call_from_autograd(*args))
        yield as_list(op.run_checked(op.check(*args), *args))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in RETURNING])
def test_a_pending_sign_is_seen(op, target):
    if target.backend not in op.backends:
        pytest.skip(f"{op.name} has no backend {target.backend}")
    sample = testing.samples_of(op)[1]
    plain = map_tensors(sample.args, lambda t: t.to(target.device, torch.float32))
    with target.active():
        wanted = as_list(op(*plain))
        for outputs in call_all_ways(op, map_tensors(plain, negated)):
            assert all(torch.equal(got, exact) for got, exact in zip(outputs, wanted, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in RETURNING])
def test_zeros_without_memory_are_zeros(op, target):
    if target.backend not in op.backends:
        pytest.skip(f"{op.name} has no backend {target.backend}")
    plain = map_tensors(testing.samples_of(op)[1].args, lambda t: t.to(target.device, torch.float32))
    count = []
    map_tensors(plain, lambda t: count.append(t) or t)
    for which in range(len(count)):

        def at(function, which=which):
            seen = []

            def once(tensor):
                seen.append(tensor)
                return function(tensor) if len(seen) == which + 1 else tensor

            return map_tensors(plain, once)

        with target.active():
            wanted = as_list(op(*at(torch.zeros_like)))
            for outputs in call_all_ways(op, at(no_memory)):
                for got, exact in zip(outputs, wanted, strict=True):
                    assert torch.equal(got.nan_to_num(), exact.nan_to_num())


@pytest.mark.parametrize("change", [negated, no_memory])
@pytest.mark.parametrize(
    "function",
    [
        lambda w: compose_sequential(w, torch.ones(4, 4, 3, 3)),
        lambda w: orepa_squeeze(w, prior=torch.ones(4, 4)),
        lambda w: branch_norm_add([w, w], [Norm(), None], "silu")[0],
    ],
    ids=["compose", "squeeze", "norm"],
)
def test_lazy_gradients(function, change):
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    out = function(weight)
    outer = torch.zeros_like(out) if change is no_memory else torch.randn_like(out)
    (wanted,) = torch.autograd.grad(out, weight, outer, retain_graph=True)
    (got,) = torch.autograd.grad(out, weight, change(outer))
    assert torch.equal(got, wanted)


def test_the_imaginary_part_of_a_conjugate_is_an_ordinary_way_to_get_one():
    z = torch.randn(4, 3, 3, 3, dtype=torch.complex64)
    other = torch.randn(5, 4, 3, 3)
    assert z.conj().imag.is_neg()
    assert torch.equal(compose_sequential(z.conj().imag, other), compose_sequential(-z.imag.clone(), other))


@pytest.mark.parametrize("change", [negated, no_memory])
def test_a_step_with_lazy_gradients_and_multipliers(change):
    start, grad = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
    factor = torch.rand(4) + 0.5
    made = []
    for lazy in (False, True):
        param, own = start.clone(), change(grad) if lazy else grad * (change is negated)
        vector = negated(factor) if lazy else factor
        grad_mult_sgd_([param], [own], None, [ChannelMultiplier(vector)], lr=0.1, weight_decay=0.01)
        dense = vector[:, None, None, None] * torch.ones(4, 4, 3, 3)
        grad_mult_sgd_([param], [own], None, [negated(dense)], lr=0.1, weight_decay=0.0)
        made.append(param)
    assert torch.equal(*made)


@pytest.mark.parametrize("kind", [RepSGD, RepAdamW])
def test_an_optimizer_with_lazy_gradients(kind):
    ours = torch.nn.Parameter(torch.randn(3, 3, 3, 3))
    theirs = copy.deepcopy(ours)
    grad = torch.randn(3, 3, 3, 3)
    for parameter, own in ((ours, negated(grad)), (theirs, grad)):
        optimizer = kind([parameter], lr=0.1)
        parameter.grad = own
        optimizer.step()
    assert torch.equal(ours, theirs)


def test_what_is_changed_in_place_must_have_memory():
    param = negated(torch.randn(3))
    with pytest.raises(RuntimeError, match="negation"):
        grad_mult_sgd_([param], [torch.ones(3)], None, None, lr=0.1, weight_decay=0.0)
