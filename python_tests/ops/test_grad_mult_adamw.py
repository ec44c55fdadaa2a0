"""grad_mult_adamw_ as users call it; both steps on every backend: test_grad_mult_steps.py."""

import pytest
import torch

from repkern.ops import ChannelMultiplier, grad_mult_adamw_

SHAPES = [(6, 4, 3, 3), (4, 4, 1, 1), (9,)]


def tensors(dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


def zeros(params):
    return [torch.zeros_like(p) for p in params]


def counts(params):
    return [torch.zeros(()) for _ in params]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_five_steps_of_torch(kind, amsgrad, maximize):
    """With every gradient multiplied by hand, in two parameter groups."""
    params = tensors()
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    factors = [torch.rand_like(p) for p in params]
    groups = [
        {"params": theirs[:2], "lr": 0.1, "weight_decay": 0.02},
        {"params": theirs[2:], "lr": 0.03, "weight_decay": 0.0},
    ]
    optimizer = kind(groups, betas=(0.8, 0.95), eps=1e-7, amsgrad=amsgrad, maximize=maximize)
    means, squares, largest, steps = zeros(params), zeros(params), zeros(params), counts(params)
    for _ in range(5):
        grads = tensors()
        for param, grad, factor in zip(theirs, grads, factors, strict=True):
            param.grad = grad * factor
        optimizer.step()
        grad_mult_adamw_(
            params, grads, means, squares, largest if amsgrad else None, factors, lr=[0.1, 0.1, 0.03],
            betas=(0.8, 0.95), eps=1e-7, weight_decay=[0.02, 0.02, 0.0], steps=steps, amsgrad=amsgrad,
            maximize=maximize, decoupled=kind is torch.optim.AdamW,
        )  # fmt: skip
    assert [step.item() for step in steps] == [5.0] * 3
    for ours, wanted in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, wanted.detach(), rtol=1e-12, atol=1e-12)


def released_step(param, grad, mean, square, multiplier, step, *, lr, betas, eps, decay):
    """As the released RepAdamW: the gradient multiplied, then the update multiplied again."""
    grad = grad * multiplier
    param = param * (1 - lr * decay)
    mean = mean * betas[0] + grad * (1 - betas[0])
    square = square * betas[1] + grad * grad * (1 - betas[1])
    denominator = square.sqrt() / (1 - betas[1] ** step) ** 0.5 + eps
    return param - lr / (1 - betas[0] ** step) * (mean * multiplier) / denominator, mean, square


def test_multiply_update_is_the_released_step():
    scale, centre = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    factor = ChannelMultiplier(scale, centre)
    param, mean, square = torch.randn(6, 4, 3, 3, dtype=torch.float64), *(torch.zeros(6, 4, 3, 3).double(),) * 2
    ours, m, v, steps = [param.clone()], [mean.clone()], [square.clone()], [torch.zeros(())]
    numbers = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    for step in range(1, 4):
        grad = torch.randn_like(param)
        dense = factor.dense(param.shape)
        param, mean, square = released_step(param, grad, mean, square, dense, step, decay=0.05, **numbers)
        grad_mult_adamw_(
            ours, [grad], m, v, None, [factor], weight_decay=0.05, steps=steps, multiply_update=True, **numbers
        )
    torch.testing.assert_close(ours[0], param, rtol=1e-12, atol=1e-12)


def test_absolute_scales_are_the_sum_of_branches_and_their_sum_is_not():
    """Two branches with scales of different sign, each trained by AdamW, against one kernel."""
    s3, s1 = 0.5, -0.3
    wide, narrow = torch.randn(4, 4, 3, 3).double(), torch.randn(4, 4, 1, 1).double()
    branches = [torch.nn.Parameter(wide.clone()), torch.nn.Parameter(narrow.clone())]
    optimizer = torch.optim.AdamW(branches, lr=0.01, weight_decay=0.1, eps=1e-15)

    def merged(wide, narrow):
        kernel = s3 * wide
        kernel[:, :, 1:2, 1:2] += s1 * narrow
        return kernel

    start = merged(wide, narrow)
    kernels = {"absolute": start.clone(), "released": start.clone()}
    state = {name: (zeros([start]), zeros([start]), counts([start])) for name in kernels}
    factors = {"absolute": (abs(s3), abs(s1)), "released": (s3, s1)}
    for _ in range(4):
        grad = torch.randn_like(start)
        branches[0].grad, branches[1].grad = s3 * grad, s1 * grad[:, :, 1:2, 1:2]
        optimizer.step()
        for name, kernel in kernels.items():
            scale, centre = (torch.full((4,), s).double() for s in factors[name])
            means, squares, steps = state[name]
            grad_mult_adamw_(
                [kernel], [grad], means, squares, None, [ChannelMultiplier(scale, centre)], lr=0.01,
                betas=(0.9, 0.999), eps=1e-15, weight_decay=0.1, steps=steps, multiply_update=True,
            )  # fmt: skip
    wanted = merged(*(b.detach() for b in branches))
    torch.testing.assert_close(kernels["absolute"], wanted, rtol=1e-9, atol=1e-9)
    assert (kernels["released"] - wanted)[:, :, 1, 1].abs().min() > 1e-4
    assert (kernels["released"] - wanted)[:, :, 0, 0].abs().max() < 1e-9


def test_a_skipped_step_does_not_count():
    params, grads = tensors(torch.float32), tensors(torch.float32)
    steps, flag = counts(params), torch.ones(1)
    numbers = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "steps": steps, "found_inf": flag}
    means, squares = zeros(params), zeros(params)
    grad_mult_adamw_(params, grads, means, squares, None, None, **numbers)
    assert [step.item() for step in steps] == [0.0] * 3
    flag.zero_()
    grad_mult_adamw_(params, grads, means, squares, None, None, **numbers)
    assert [step.item() for step in steps] == [1.0] * 3


def test_a_compiled_step():
    params, grads = tensors(torch.float32), tensors(torch.float32)
    eager = [p.clone() for p in params]
    factors = [ChannelMultiplier(torch.rand(6), torch.rand(6)), ChannelMultiplier(torch.rand(4)), None]

    def state():
        return zeros(params), zeros(params), zeros(params), counts(params)

    def step(params, grads, means, squares, largest, steps):
        grad_mult_adamw_(
            params, grads, means, squares, largest, factors, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01,
            steps=steps, amsgrad=True,
        )  # fmt: skip

    ours, theirs = state(), state()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            compiled(params, grads, *ours)
            step(eager, grads, *theirs)
    for a, b in zip([*params, *ours[3]], [*eager, *theirs[3]], strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_list_is_fine():
    grad_mult_adamw_([], [], [], [], [], [], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, steps=[])


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"betas": (1.0, 0.9)}, ValueError, r"`betas\[0\]` must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, float("nan"))}, ValueError, r"`betas\[1\]` must be in \[0, 1\), got nan"),
        ({"eps": -1.0}, ValueError, "`eps` must be at least 0, got -1.0"),
        ({"steps": []}, ValueError, "1 parameters, but 0 `steps`"),
        ({"steps": [torch.zeros(2)]}, ValueError, r"`steps\[0\]` must have one element"),
        ({"steps": [torch.zeros((), dtype=torch.long)]}, TypeError, r"`steps\[0\]` must be float32, got torch.int64"),
        ({"amsgrad": True}, ValueError, "1 parameters, but 0 `max_exp_avg_sqs`"),
        ({"lr": [0.1, 0.1]}, ValueError, "1 parameters, but 2 values of `lr`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes, error, text):
    numbers = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "steps": [torch.zeros(())]}
    four = [[torch.zeros(3)] for _ in range(4)]
    with pytest.raises(error, match=text):
        grad_mult_adamw_(*four, None, None, **(numbers | changes))


def test_shared_step_counts_are_refused():
    params, step = tensors(torch.float32), torch.zeros(())
    with pytest.raises(ValueError, match=r"`steps\[1\]` is in the list twice"):
        grad_mult_adamw_(
            params, params, params, params, None, None, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
            steps=[step] * 3,
        )  # fmt: skip
