"""CSLA = GR: training the branches equals training one kernel with Grad Mult, step for step (paper, Appendix A)."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern.optim import GradMult, RepAdamW, RepSGD, csla_kernel

STEPS = 50
# Ci, Co, K, stride, groups, pointwise branch, identity branch
SHAPES = {
    "3x3+1x1+identity": (6, 6, 3, 1, 1, True, True),
    "3x3+1x1, stride 2": (4, 6, 3, 2, 1, True, False),
    "groups": (6, 6, 3, 1, 3, True, True),
    "depthwise+identity (RepGhost)": (6, 6, 3, 1, 6, False, True),
    "1x1+identity (RepGhost)": (6, 6, 1, 1, 1, False, True),
    "5x5+1x1, groups, stride 2": (4, 8, 5, 2, 2, True, False),
}
SGD = {
    "plain": {},
    "momentum": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    "maximize": {"momentum": 0.8, "weight_decay": 0.05, "maximize": True},
}


class Branches(nn.Module):
    """The CSLA block written out: one convolution a branch, constant scales, the identity's scale trained."""

    def __init__(self, ci, co, k, stride, groups, pointwise, identity):
        super().__init__()
        self.stride, self.groups = stride, groups
        self.dense = nn.Parameter(torch.randn(co, ci // groups, k, k, dtype=torch.float64) / 4)
        self.pointwise = (
            nn.Parameter(torch.randn(co, ci // groups, 1, 1, dtype=torch.float64) / 2) if pointwise else None
        )
        self.identity = nn.Parameter(torch.ones(co, dtype=torch.float64)) if identity else None
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(co)
        self.s = (0.4 + torch.rand(co, dtype=torch.float64)) * signs[:co]
        self.t = 0.4 + torch.rand(co, dtype=torch.float64)

    def forward(self, x):
        y = self.s[:, None, None] * functional.conv2d(
            x, self.dense, None, self.stride, self.dense.shape[-1] // 2, 1, self.groups
        )
        if self.pointwise is not None:
            y = y + self.t[:, None, None] * functional.conv2d(x, self.pointwise, None, self.stride, 0, 1, self.groups)
        return y if self.identity is None else y + self.identity[:, None, None] * x

    def kernel(self):
        t = None if self.pointwise is None else self.t
        return csla_kernel(self.dense, self.s, self.pointwise, t, self.identity, groups=self.groups).detach()

    def grad_mult(self):
        t = None if self.pointwise is None else self.t
        return GradMult(self.s, t, self.identity is not None, self.groups)


def train(branches, make_plain, make_branches, check):
    """Both on the same batches; `check(kernel of the branches, weight)` after each step."""
    weight = nn.Parameter(branches.kernel())
    ours, theirs = make_plain(weight), make_branches(branches.parameters())
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) for optimizer in (ours, theirs)]
    padding = weight.shape[-1] // 2
    for step in range(STEPS):
        x = torch.randn(4, weight.shape[1] * branches.groups, 6, 6, dtype=torch.float64)
        with torch.no_grad():
            toward = torch.randn_like(branches(x))
        for optimizer, output in (
            (theirs, branches),
            (ours, lambda x: functional.conv2d(x, weight, None, branches.stride, padding, 1, branches.groups)),
        ):
            optimizer.zero_grad()
            (output(x) - toward).square().mean().backward()
        sign = -1 if ours.defaults["maximize"] else 1
        for parameter in (weight, *branches.parameters()):
            parameter.grad.mul_(sign)
        ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()
        check(branches.kernel(), weight, step)
    return weight


@pytest.mark.parametrize("rule", SGD)
@pytest.mark.parametrize("shape", SHAPES)
def test_sgd(shape, rule, same):
    branches = Branches(*SHAPES[shape])
    start = branches.kernel()
    weight = train(
        branches,
        lambda w: RepSGD([w], 0.1, **SGD[rule], grad_mults={w: branches.grad_mult()}),
        lambda parameters: torch.optim.SGD(parameters, 0.1, **SGD[rule]),
        lambda kernel, weight, step: same(weight, kernel, 1e-12, f"after step {step}"),
    )
    assert (weight - start).abs().max() > 0.05, "too little was learned to show anything"


def adamw_difference(shape, **options):
    """How far the kernel gets from the sum of its branches, relative to its largest value."""
    torch.manual_seed(1)
    branches = Branches(*SHAPES[shape])
    differences = []
    train(
        branches,
        lambda w: RepAdamW([w], 0.01, **options, grad_mults={w: branches.grad_mult()}),
        lambda parameters: torch.optim.AdamW(parameters, 0.01, **{k: v for k, v in options.items() if k != "released"}),
        lambda kernel, weight, step: differences.append(((weight - kernel).abs().max() / kernel.abs().max()).item()),
    )
    return max(differences)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_adamw_to_its_eps(shape, amsgrad):
    """A branch divides by sqrt(v) + eps / |s|, the kernel by sqrt(v) + eps / sum |s|: they differ by some eps."""
    options = {"weight_decay": 0.1, "amsgrad": amsgrad}
    assert adamw_difference(shape, eps=1e-8, **options) < 1e-5
    assert adamw_difference(shape, eps=1e-14, **options) < 1e-11


def test_signed_sums_of_the_released_adamw_are_another_training():
    assert adamw_difference("3x3+1x1+identity", released=True) > 1e-2


@pytest.mark.parametrize(
    "name",
    ["sgd_plain_ident", "sgd_momentum_wd_noident", "sgd_nesterov_wd_ident", "adamw_ident", "adamw_noident"],
)
def test_the_released_trajectories(name, trajectory, same):
    """The released optimizers on their own multipliers, and the ordinary ones on the CSLA block."""
    recorded = trajectory(name)
    config, scales = recorded["config"], [scale.squeeze() for scale in recorded["scales"]]
    mult = GradMult(scales[-1], scales[-2], config["identity"])
    adam = config["rule"] == "adamw"
    same(mult.dense(recorded["weight0"].shape, 1 if adam else 2, released=True), recorded["grad_mult"], 1e-12, "M")
    init = recorded["csla_init"]
    identity = init["kid"] if config["identity"] else None
    same(csla_kernel(init["k3"], scales[-1], init["k1"], scales[-2], identity), recorded["weight0"], 1e-12, "Eq. 4")
    weight = nn.Parameter(recorded["weight0"].clone())
    kind = RepAdamW if adam else RepSGD
    optimizer = kind([weight], **config["kwargs"], **({"released": True} if adam else {}), grad_mults={weight: mult})
    eps_moves = 1e-5 if adam else 1e-12  # of the largest; the recorded difference of the released code is as large
    for step, (x, toward) in enumerate(zip(recorded["inputs"], recorded["targets"], strict=True)):
        optimizer.zero_grad()
        (functional.conv2d(x, weight, padding=1) - toward).square().mean().backward()
        same(weight.grad, recorded["grads"][step], 1e-12, f"gradient {step}")
        optimizer.step()
        same(weight, recorded["weights"][step], 1e-12, f"weight after step {step}")
        same(weight, recorded["csla_weights"][step], eps_moves, f"CSLA kernel after step {step}")
    for key, value in recorded["final_state"].items():
        same(optimizer.state[weight][key], value, 1e-12, key)
