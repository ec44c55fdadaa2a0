"""RepSGD and RepAdamW as torch.optim.Optimizers: groups, schedules, hooks, scaling, copies."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import repkern.optim.adamw
import repkern.optim.sgd
from repkern.optim import GradMult, RepAdamW, RepSGD
from repkern.testing import assert_close

SGD = [
    {},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.5, "maximize": True},
    {"momentum": 0.9, "nesterov": True},
]
ADAMW = [{}, {"amsgrad": True, "weight_decay": 0.3}, {"maximize": True, "betas": [0.5, 0.9], "eps": 1e-3}]
PAIRS = [(RepSGD, torch.optim.SGD, o) for o in SGD] + [(RepAdamW, torch.optim.AdamW, o) for o in ADAMW]
every_rule = pytest.mark.parametrize(
    ("ours", "theirs", "options"), PAIRS, ids=[f"{a.__name__}-{o}" for a, _, o in PAIRS]
)
both = pytest.mark.parametrize("kind", [RepSGD, RepAdamW])
OPTIONS = {RepSGD: {"momentum": 0.9, "nesterov": True}, RepAdamW: {"amsgrad": True}}


def network(dtype=torch.float64):
    torch.manual_seed(3)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 1))
    return nn.Sequential(*layers).to(dtype)


def mults(net):
    s = torch.tensor([0.5, -1.5, 2.0, 1.0])
    return {net[0].weight: GradMult(s, -s), net[2].weight: GradMult(s, s.flip(0), True, 2)}


def backward(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64).to(net[0].weight.dtype)
    net(x).square().mean().backward()


def train(net, optimizer, steps=3, first=0):
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        backward(net, seed)
        optimizer.step()


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def groups_of(net):
    return [
        {"params": [net[0].weight, net[0].bias], "lr": 0.03, "weight_decay": 0.2},
        {"params": [net[2].weight, net[2].bias]},
        {"params": list(net[4].parameters()), "lr": 0.2},
    ]


@every_rule
def test_without_multipliers_they_are_the_optimizers_of_torch(ours, theirs, options, same):
    nets = network(), network()
    optimizers = [
        kind(groups_of(net), 0.1, **options, **more)
        for kind, net, more in ((ours, nets[0], {}), (theirs, nets[1], {"foreach": False}))
    ]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    for seed in range(4):
        for net, optimizer, schedule in zip(nets, optimizers, schedules, strict=True):
            train(net, optimizer, 1, seed)
            schedule.step()
    for mine, wanted in zip(*(net.parameters() for net in nets), strict=True):
        same(mine, wanted, 1e-12)
    assert not torch.allclose(nets[0][0].weight, network()[0].weight)


@both
@pytest.mark.parametrize("lr", [float, lambda lr: torch.tensor(lr, dtype=torch.float64)], ids=["number", "tensor"])
def test_schedules_of_other_settings(kind, lr, same):
    """OneCycleLR moves momentum or betas too."""
    theirs = torch.optim.SGD if kind is RepSGD else torch.optim.AdamW
    options = {"momentum": 0.9} if kind is RepSGD else {}
    nets = network(), network()
    for net, own in zip(nets, (kind, theirs), strict=True):
        optimizer = own(net.parameters(), lr(0.1), **options, **({} if own is kind else {"foreach": False}))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=5)
        for seed in range(4):
            train(net, optimizer, 1, seed)
            schedule.step()
    for mine, wanted in zip(*(net.parameters() for net in nets), strict=True):
        same(mine, wanted, 1e-12)


@every_rule
def test_a_multiplier_scales_the_gradient_or_the_update(ours, theirs, options, same):
    """With a multiplier of one number everywhere, by the ordinary optimizer with another gradient or learning rate."""
    net, other = network(), network()
    factor = torch.full_like(net[0].weight, 2.0)
    decay = {"weight_decay": options.get("weight_decay", 0.0) if ours is RepSGD else 0.0}
    optimizer = ours(net.parameters(), 0.1, **{**options, **decay}, grad_mults={net[0].weight: factor})
    first, *rest = other.parameters()
    lr = 0.1 if ours is RepSGD else 0.2
    eps = {} if ours is RepSGD else {"eps": options.get("eps", 1e-8) / 2}
    plain = theirs([{"params": [first], "lr": lr, **eps}, {"params": rest}], 0.1, **{**options, **decay}, foreach=False)
    for seed in range(3):
        train(net, optimizer, 1, seed)
        plain.zero_grad()
        backward(other, seed)
        if ours is RepSGD:
            first.grad *= 2
        plain.step()
    for mine, wanted in zip(net.parameters(), other.parameters(), strict=True):
        same(mine, wanted, 1e-12)


@both
def test_one_call_of_the_op_a_step(kind, monkeypatch):
    module, name = (
        (repkern.optim.sgd, "grad_mult_sgd_") if kind is RepSGD else (repkern.optim.adamw, "grad_mult_adamw_")
    )
    calls, op = [], getattr(module, name)

    def counted(params, *args, **options):
        calls.append(len(params))
        return op(params, *args, **options)

    monkeypatch.setattr(module, name, counted)
    net = network()
    optimizer = kind(groups_of(net), 0.1, grad_mults=mults(net))
    train(net, optimizer, 2)
    assert calls == [6, 6]
    optimizer.param_groups[1]["maximize"] = True  # what the op cannot take per parameter
    train(net, optimizer, 1)
    assert calls == [6, 6, 4, 2]


@both
def test_a_parameter_without_a_gradient_stays(kind):
    net = network()
    net[2].requires_grad_(False)
    optimizer = kind(net.parameters(), 0.1, weight_decay=0.1, grad_mults=mults(net))
    frozen, moved = net[2].weight.clone(), net[0].weight.clone()
    train(net, optimizer)
    assert torch.equal(net[2].weight, frozen)
    assert not torch.equal(net[0].weight, moved)
    assert net[2].weight not in optimizer.state
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    before = net[0].weight.clone()
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    optimizer.zero_grad(set_to_none=False)


@both
def test_closures_and_hooks(kind):
    net, other, seen = network(), network(), []
    optimizer = kind(net.parameters(), 0.1, grad_mults=mults(net))
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda optimizer, state: seen.append(sorted(state)))

    def closure():
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        backward(net)
        return 7.0

    assert [optimizer.step(closure) for _ in range(3)] == [7.0] * 3
    optimizer.state_dict()
    train(other, kind(other.parameters(), 0.1, grad_mults=mults(other)), 1)
    assert not equal(net, other)
    assert seen == ["before", "after"] * 3 + [["param_groups", "state"]]


@both
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_agree(kind, memory_format, same):
    net, other = network(), network().to(memory_format=memory_format)
    for model in (net, other):
        train(model, kind(model.parameters(), 0.1, **OPTIONS[kind], grad_mults=mults(model)))
    for mine, wanted in zip(other.parameters(), net.parameters(), strict=True):
        same(mine, wanted, 1e-12)


@both
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_go_on_the_same(kind, copied):
    net = network()
    optimizer = kind(net.parameters(), 0.1, **OPTIONS[kind], grad_mults=mults(net))
    train(net, optimizer)
    other_net, other = copied((net, optimizer))
    train(net, optimizer, first=3)
    assert not equal(net, other_net)
    train(other_net, other, first=3)
    assert equal(net, other_net)
    assert list(other.grad_mults.values()) == list(optimizer.grad_mults.values())


@both
def test_grad_scaler(kind):
    """Powers of two scale without rounding, so that scaled and unscaled training are bit for bit the same."""
    net, other = network(torch.float32), network(torch.float32)
    optimizer, plain = (kind(m.parameters(), 0.1, **OPTIONS[kind], grad_mults=mults(m)) for m in (net, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)

    def loss(model, seed):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        return model(x).square().mean()

    for seed in range(4):
        for model, own in ((net, optimizer), (other, plain)):
            own.zero_grad()
            (scaler.scale(loss(model, seed)) if own is optimizer else loss(model, seed)).backward()
        if seed == 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        plain.step()
    assert equal(net, other)
    assert scaler.get_scale() == 1024


@both
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_a_step_with_an_infinite_gradient_is_left_out(kind, dampening):
    net, other = network(torch.float32), network(torch.float32)
    options = {"momentum": 0.9, "dampening": dampening} if kind is RepSGD else {}
    optimizer, plain = (kind(m.parameters(), 0.1, **options, grad_mults=mults(m)) for m in (net, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for seed, broken in ((0, True), (0, False), (1, True), (1, False)):
        before = copy.deepcopy(net.state_dict())
        optimizer.zero_grad()
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        scaler.scale(net(x).square().mean()).backward()
        if broken:
            net[2].weight.grad[0, 0, 0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if broken:
            assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
            continue
        plain.zero_grad()
        other(x).square().mean().backward()
        plain.step()
        assert equal(net, other)


@both
def test_half_parameters_have_wide_state(kind):
    """The same gradients given to both: the half one differs by the rounding of what is written, and of float32."""
    net, exact = network(torch.bfloat16), network(torch.bfloat16).double()
    optimizers = [kind(m.parameters(), 0.1, **OPTIONS[kind], grad_mults=mults(m)) for m in (net, exact)]
    for half, double in zip(net.parameters(), exact.parameters(), strict=True):
        half.grad = torch.randn_like(half)
        double.grad = half.grad.double()
    for optimizer in optimizers:
        optimizer.step()
    assert all(t.dtype is torch.float32 for state in optimizers[0].state.values() for t in state.values())
    for half, double in zip(net.parameters(), exact.parameters(), strict=True):
        bound = torch.finfo(torch.bfloat16).eps / 2 * double.detach().abs() + 1e-6
        assert_close(half, double, bound, "one step")


@both
def test_compiled(kind):
    net, other = network(), network()
    optimizers = [kind(m.parameters(), 0.1, **OPTIONS[kind], grad_mults=mults(m)) for m in (net, other)]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]
    compiled = torch.compile(lambda: optimizers[0].step(), backend="eager")
    for seed in range(3):
        for model, step in ((net, compiled), (other, optimizers[1].step)):
            model.zero_grad()
            backward(model, seed)
            step()
        for schedule in schedules:
            schedule.step()
    assert equal(net, other)


def test_representation():
    net = network()
    assert "grad_mults: 2" in repr(RepSGD(net.parameters(), 0.1, grad_mults=mults(net)))


class _Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)

    def forward(self, at):
        return functional.relu(self.table(at))


@both
def test_sparse_gradients_are_refused(kind):
    net = _Table()
    optimizer = kind(net.parameters(), 0.1)
    before = net.table.weight.clone()
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"Rep\w+ does not support sparse gradients, got torch.sparse_coo .*\(5, 3\)"
    ):
        optimizer.step()
    assert torch.equal(net.table.weight, before)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RepSGD, {"lr": -1.0}, "lr must be zero or more, got -1"),
        (RepSGD, {"lr": float("nan")}, "lr must be zero or more, got nan"),
        (RepSGD, {"momentum": -0.5}, r"momentum must be zero or more, got -0\.5"),
        (RepSGD, {"weight_decay": -1e-4}, r"weight_decay must be zero or more, got -0\.0001"),
        (RepSGD, {"nesterov": True}, r"nesterov needs a momentum and no dampening, got momentum=0\.0, dampening=0\.0"),
        (RepAdamW, {"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0\.9, 1\.0\)"),
        (RepAdamW, {"eps": -1.0}, "eps must be zero or more, got -1"),
    ],
)
def test_settings_that_cannot_be(kind, options, message):
    net = network()
    with pytest.raises(ValueError, match=message):
        kind(net.parameters(), **options)
    optimizer = kind([net[0].weight])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [net[2].weight], **options})
    assert len(optimizer.param_groups) == 1


@both
def test_parameters_that_cannot_be(kind):
    net = network()
    with pytest.raises(ValueError, match="parameters appear in more than one parameter group"):
        kind([{"params": [net[0].weight]}, {"params": [net[2].weight, net[0].weight]}])
    with pytest.raises(ValueError, match=r"params\[1\] of the group is in it twice"):
        kind([net[0].weight, net[0].weight])
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])
    with pytest.raises(TypeError, match="ordered"):
        kind([{"params": {net[0].weight}}])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        kind(net[0].weight)


@both
def test_multipliers_that_cannot_be(kind):
    net, weight = network(), nn.Parameter(torch.zeros(4, 3, 3, 3))
    good = GradMult(torch.ones(4))
    for bad, message in [
        ({weight: good}, r"1 of 1 grad_mults are for parameters that this optimizer does not have: a parameter \(4, 3"),
        ({"0.weight": good}, "does not have: '0.weight'"),
        ({net[4].weight: good}, r"4\.weight \(2, 4, 1, 1\): conv_scale has 4 channels, .* has 2 outputs"),
        ({net[0].weight: torch.ones(3)}, r"0\.weight .*: a dense multiplier needs the parameter's shape, got \(3,\)"),
        ({net[0].bias: torch.full((4,), torch.nan)}, "the dense multiplier has values that are not finite"),
        ({net[0].bias: torch.ones(4, dtype=torch.int64)}, r"a dense multiplier must be floating, got torch\.int64"),
        ({net[0].weight: 2.0}, "a multiplier is a GradMult or a tensor, got float"),
    ]:
        with pytest.raises(ValueError, match=message):
            kind(net.named_parameters(), grad_mults=bad)
    optimizer = kind([net[0].weight])
    with pytest.raises(ValueError, match=r"parameter 1 \(2, 4, 1, 1\): conv_scale has 4"):
        optimizer.add_param_group({"params": [net[4].weight], "grad_mults": {net[4].weight: good}})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [net[2].weight], "grad_mults": {net[2].weight: good}})
    assert optimizer.grad_mults == {net[2].weight: good}
