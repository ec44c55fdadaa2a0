"""grad_mult_sgd_ and ChannelMultiplier as users call them; both steps on every backend: test_grad_mult_steps.py."""

import pytest
import torch
from torch.nn import functional

from repkern.ops import ChannelMultiplier, grad_mult_sgd_

SHAPES = [(6, 4, 3, 3), (4, 4, 1, 1), (9,), (6, 3, 3, 3)]


def tensors(dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


def multipliers():
    def vector(n):
        return torch.rand(n, dtype=torch.float64)

    return [
        ChannelMultiplier(vector(6), vector(6)),
        ChannelMultiplier(vector(4), identity=1.0),
        None,
        ChannelMultiplier(vector(6), vector(6), 1.0, groups=2),
    ]


def dense(multiplier, shape):
    return 1.0 if multiplier is None else multiplier.dense(shape)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "maximize": True},
        {"momentum": 0.8, "dampening": 0.4},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_five_steps_of_torch_sgd(options):
    """With every gradient multiplied by hand, in two parameter groups."""
    params, factors = tensors(), multipliers()
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    groups = [{"params": theirs[:2], "lr": 0.1, "weight_decay": 0.02}, {"params": theirs[2:], "lr": 0.03}]
    optimizer = torch.optim.SGD(groups, **options)
    buffers = [torch.full_like(p, torch.nan) for p in params] if "momentum" in options else None
    for step in range(5):
        grads = tensors()
        for param, grad, factor in zip(theirs, grads, factors, strict=True):
            param.grad = grad * dense(factor, grad.shape)
        optimizer.step()
        lr, decay = [0.1, 0.1, 0.03, 0.03], [0.02, 0.02, 0.0, 0.0]
        grad_mult_sgd_(
            params, grads, buffers, factors, lr=lr, weight_decay=decay, first_step=[step == 0] * 4, **options
        )
    for ours, wanted in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, wanted.detach(), rtol=1e-13, atol=1e-13)


def test_buffers_of_zeros_need_no_mark_without_dampening():
    params, grads = tensors(), tensors()
    marked = [p.clone() for p in params]
    zeros, empty = ([torch.full_like(p, value) for p in params] for value in (0.0, torch.nan))
    grad_mult_sgd_(params, grads, zeros, None, lr=0.1, weight_decay=0.1, momentum=0.9)
    grad_mult_sgd_(marked, grads, empty, None, lr=0.1, weight_decay=0.1, momentum=0.9, first_step=[True] * 4)
    for a, b in zip([*params, *zeros], [*marked, *empty], strict=True):
        assert torch.equal(a, b)


def test_half_precision_parameters_are_rounded_once():
    param, grad, buffer = torch.ones(64, dtype=torch.bfloat16), torch.rand(64).bfloat16(), torch.rand(64)
    wanted = 0.9 * buffer + grad.float()
    grad_mult_sgd_([param], [grad], [buffer], None, lr=0.001, weight_decay=0.0, momentum=0.9)
    torch.testing.assert_close(buffer, wanted)
    assert torch.equal(param, (1.0 - 0.001 * buffer).bfloat16())


def test_grad_scaler_hands_over_scale_and_infinity():
    params, scaled, plain = tensors(torch.float32), tensors(torch.float32), tensors(torch.float32)
    before = [p.clone() for p in params]
    scaled = [g * 1024 for g in scaled]
    scale, fine, infinite = torch.tensor([1024.0]), torch.zeros(1), torch.ones(1)
    grad_mult_sgd_(params, scaled, None, None, lr=0.5, weight_decay=0.0, grad_scale=scale, found_inf=infinite)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    grad_mult_sgd_(params, scaled, None, None, lr=0.5, weight_decay=0.0, grad_scale=scale, found_inf=fine)
    for a, b, g in zip(params, before, scaled, strict=True):
        torch.testing.assert_close(a, b - 0.5 * g / 1024)
    assert not torch.equal(params[0], plain[0])


@pytest.mark.parametrize("groups", [1, 3])
def test_the_identity_is_the_convolution_that_changes_nothing(groups):
    x = torch.randn(2, 6, 5, 5)
    kernel = ChannelMultiplier(torch.zeros(6), identity=1.0, groups=groups).dense((6, 6 // groups, 3, 3))
    torch.testing.assert_close(functional.conv2d(x, kernel, padding=1, groups=groups), x)


def test_the_centre_alone_gets_the_second_vector():
    m = ChannelMultiplier(torch.tensor([2.0, 3.0]), torch.tensor([10.0, 20.0])).dense((2, 4, 3, 5))
    assert m[0, :, 1, 2].eq(12).all()
    assert m[1, :, 1, 2].eq(23).all()
    assert m.sum().item() == 2 * 60 + 3 * 60 + 4 * 30


def test_an_empty_list_is_fine():
    grad_mult_sgd_([], [], [], [], lr=0.1, weight_decay=0.0, momentum=0.9)


def test_the_gradient_and_nothing_else_when_compiled():
    params, grads, factors = tensors(torch.float32), tensors(torch.float32), multipliers()
    factors = [
        f and ChannelMultiplier(f.scale.float(), None if f.centre is None else f.centre.float(), f.identity, f.groups)
        for f in factors
    ]
    buffers = [torch.zeros_like(p) for p in params]
    eager = [[t.clone() for t in ts] for ts in (params, buffers)]

    def step(params, grads, buffers):
        grads = [g * 2 for g in grads]
        grad_mult_sgd_(params, grads, buffers, factors, lr=0.1, weight_decay=0.01, momentum=0.9)
        return sum(p.sum() for p in params)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            answer = compiled(params, grads, buffers)
            wanted = step(eager[0], grads, eager[1])
    torch.testing.assert_close(answer, wanted)
    for ours, theirs in zip([*params, *buffers], [*eager[0], *eager[1]], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_parameters_that_share_memory_are_refused():
    param = torch.zeros(8)
    with pytest.raises(ValueError, match=r"`params\[1\]` and `params\[0\]` lie in the same memory"):
        grad_mult_sgd_([param, param.view(2, 4)], [param, param.view(2, 4)], None, None, lr=0.1, weight_decay=0.0)


def call(**changes):
    arguments = {
        "params": [torch.zeros(4, 3, 3, 3)],
        "grads": [torch.zeros(4, 3, 3, 3)],
        "momentum_buffers": [torch.zeros(4, 3, 3, 3)],
        "multipliers": None,
        "lr": 0.1,
        "weight_decay": 0.0,
        "momentum": 0.9,
    } | changes
    with torch.no_grad():
        grad_mult_sgd_(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"multipliers": []}, ValueError, "1 parameters, but 0 multipliers"),
        ({"multipliers": [1.0]}, TypeError, "a multiplier is None, a ChannelMultiplier or a tensor, got float"),
        ({"multipliers": [torch.ones(4)]}, ValueError, r"must have shape \(4, 3, 3, 3\), got \(4,\)"),
        ({"multipliers": [torch.ones(4, 3, 3, 3).double()]}, TypeError, "must be torch.float32, got torch.float64"),
        ({"multipliers": [ChannelMultiplier(torch.ones(5))]}, ValueError, r"must have shape \(4,\), got \(5,\)"),
        ({"multipliers": [ChannelMultiplier(torch.ones(4), identity=1.0)]}, ValueError, "3 x 1 groups = 3 and 4"),
        ({"momentum_buffers": None}, ValueError, "1 parameters, but 0 `momentum_buffers`"),
        ({"lr": [0.1, 0.2]}, ValueError, "1 parameters, but 2 values of `lr`"),
        ({"lr": float("nan")}, ValueError, r"`lr` must be finite, got nan for `params\[0\]`"),
        ({"weight_decay": float("inf")}, ValueError, "`weight_decay` must be finite, got inf"),
        ({"first_step": [True, False]}, ValueError, "1 parameters, but 2 values of `first_step`"),
        ({"nesterov": True, "dampening": 0.1}, ValueError, "nesterov needs momentum > 0 and dampening = 0"),
        ({"momentum": float("nan")}, ValueError, "`momentum` must be finite, got nan"),
        ({"found_inf": torch.zeros(2)}, ValueError, r"`found_inf` must have one element, got shape \(2,\)"),
        ({"grad_scale": torch.ones(1).double()}, TypeError, "`grad_scale` must be float32, got torch.float64"),
        ({"grads": [torch.zeros(4, 3, 3, 3).half()]}, TypeError, r"`grads\[0\]` must be torch.float32, got"),
        ({"grads": [None]}, TypeError, r"`grads\[0\]` must be a tensor, got NoneType"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes, error, text):
    with pytest.raises(error, match=text):
        call(**changes)


def test_a_multiplier_needs_a_convolution_and_a_centre():
    even, flat = torch.zeros(4, 3, 2, 2), torch.zeros(4, 3)
    for tensor, text in ((even, "odd sizes, got"), (flat, r"needs a \[Co, Ci/g, Kh, Kw\] weight, got")):
        factor = ChannelMultiplier(torch.ones(4), torch.ones(4))
        with pytest.raises(ValueError, match=text):
            grad_mult_sgd_([tensor], [tensor.clone()], None, [factor], lr=0.1, weight_decay=0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.tensor([1.0, float("nan")]),), ValueError, "`scale` must be finite, got nan at channel 1"),
        ((torch.ones(2), torch.tensor([float("inf"), 1])), ValueError, "`centre` must be finite, got inf at channel 0"),
        ((torch.ones(2, 1),), ValueError, r"`scale` must be \[Co\] with Co >= 1, got \(2, 1\)"),
        ((torch.ones(2, dtype=torch.long),), TypeError, "must be a float32 or float64 tensor, got torch.int64"),
        ((torch.ones(2), torch.ones(3)), ValueError, "`centre` has shape"),
        ((torch.ones(2), None, float("inf")), ValueError, "`identity` must be finite, got inf"),
        ((torch.ones(4), None, 1.0, 3), ValueError, "`groups` must divide the 4 channels of `scale`, got 3"),
    ],
)
def test_bad_multipliers_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        ChannelMultiplier(*arguments)
