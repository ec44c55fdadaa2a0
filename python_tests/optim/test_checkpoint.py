"""state_dict and load_state_dict: the multipliers travel with the optimizer."""

import pytest
import torch
from torch import nn

from repkern.optim import GradMult, RepAdamW, RepSGD

both = pytest.mark.parametrize("kind", [RepSGD, RepAdamW])
OPTIONS = {RepSGD: {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, RepAdamW: {"amsgrad": True}}
S = torch.tensor([0.5, -1.5, 2.0, 1.0])


def network(dtype=torch.float64, seed=3, channels=4):
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(3, channels, 3),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.Conv2d(channels, 2, 1),
    )
    return nn.Sequential(*layers).to(dtype)


def groups(net):
    return [{"params": net[0].parameters(), "lr": 0.05}, {"params": [*net[2].parameters(), *net[3].parameters()]}]


def made(kind, net):
    dense = torch.rand(2, 4, 1, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    mults = {net[0].weight: GradMult(S), net[2].weight: GradMult(S, S.flip(0), True), net[3].weight: dense}
    return kind(groups(net), 0.1, **OPTIONS[kind], grad_mults=mults)


def train(net, optimizer, first, steps=3):
    for seed in range(first, first + steps):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64).to(net[0].weight.dtype)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_bit_for_bit(kind, dtype, tmp_path):
    """The new optimizer is made from parameters alone: nothing of the multipliers is rebuilt by hand."""
    net = network(dtype)
    optimizer = made(kind, net)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(net, optimizer, 0)
    schedule.step()
    torch.save({"optimizer": optimizer.state_dict(), "net": net.state_dict()}, tmp_path / "state.pt")
    train(net, optimizer, 3)

    resumed = network(dtype, seed=9)
    other = kind(groups(resumed), 9.0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["net"])
    other.load_state_dict(state["optimizer"])
    assert [group["lr"] for group in other.param_groups] == [0.025, 0.05]
    for before, after in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    train(resumed, other, 3)
    assert equal(net, resumed)
    ours, theirs = list(optimizer.grad_mults.values()), list(other.grad_mults.values())
    assert ours[:2] == theirs[:2]
    assert torch.equal(ours[2], theirs[2])


@both
def test_loading_copies(kind):
    net, other_net = network(), network()
    optimizer, other = made(kind, net), made(kind, other_net)
    train(net, optimizer, 0, 1)
    other.load_state_dict(optimizer.state_dict())
    kept = {name: t.clone() for name, t in other.state[other_net[0].weight].items()}
    train(net, optimizer, 1)
    assert kept
    assert all(torch.equal(t, kept[name]) for name, t in other.state[other_net[0].weight].items())


@both
def test_loaded_multipliers_replace_those_that_are_there(kind):
    net = network()
    optimizer, other = kind(net.parameters(), 0.1), made(kind, network())
    optimizer = kind([{"params": net[0].parameters()}, {"params": [*net[2].parameters(), *net[3].parameters()]}])
    other.load_state_dict(optimizer.state_dict())
    assert other.grad_mults == {}


@pytest.mark.parametrize(
    ("kind", "theirs"), [(RepSGD, torch.optim.SGD), (RepAdamW, torch.optim.AdamW)], ids=["sgd", "adamw"]
)
def test_state_of_torch_optimizers(kind, theirs, same):
    """A run that began without multipliers goes on with them; those of the new optimizer stay."""
    net, other = network(torch.float32), network(torch.float32)
    plain = theirs(groups(net), 0.1, **OPTIONS[kind])
    train(net, plain, 0)
    other.load_state_dict(net.state_dict())
    optimizer = kind(groups(other), 0.1, **OPTIONS[kind])
    optimizer.load_state_dict(plain.state_dict())
    with_mults = made(kind, network(torch.float32))
    with_mults.load_state_dict(plain.state_dict())
    assert len(with_mults.grad_mults) == 3
    train(net, plain, 3)
    train(other, optimizer, 3)
    for mine, wanted in zip(other.parameters(), net.parameters(), strict=True):
        same(mine, wanted, 1e-5)


def test_state_of_old_versions():
    """Steps were plain numbers once, and on the CPU whatever the parameter's device."""
    net = network(torch.float32)
    plain, optimizer = torch.optim.AdamW(groups(net), 0.1), RepAdamW(groups(net), 0.1)
    train(net, plain, 0)
    state = plain.state_dict()
    for own in state["state"].values():
        own["step"] = 3
    optimizer.load_state_dict(state)
    loaded = optimizer.state[net[0].weight]["step"]
    assert (loaded.item(), loaded.dtype, loaded.shape) == (3, torch.float32, ())


@both
def test_hooks_see_and_change_what_is_loaded(kind):
    net = network()
    optimizer, other = made(kind, net), made(kind, network())
    train(net, optimizer, 0, 1)

    def without_multipliers(_, state):
        assert set(state) == {"state", "param_groups", "grad_mults"}
        return {**state, "grad_mults": {}, "state": {}}

    other.register_load_state_dict_pre_hook(without_multipliers)
    other.load_state_dict(optimizer.state_dict())
    assert other.grad_mults == {}
    assert not other.state
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


@both
def test_another_network_is_refused_and_nothing_changed(kind):
    net = network()
    optimizer = made(kind, net)
    train(net, optimizer, 0, 1)
    other = kind(groups(wide := network(channels=6)), 0.1, **OPTIONS[kind])
    train(wide, other, 0, 1)
    before = {p: dict(state) for p, state in other.state.items()}
    with pytest.raises(ValueError, match=r"of another model \(\d+ mismatches\):\n  parameter 0 \(6, 3, 3, 3\): its "):
        other.load_state_dict(optimizer.state_dict())
    assert other.grad_mults == {}
    assert all(other.state[p][name] is t for p, state in before.items() for name, t in state.items())
    fresh = made(kind, network())  # no state yet, so that only the multipliers tell
    with pytest.raises(ValueError, match=r"parameter 0 \(6, 3, 3, 3\): conv_scale has 4 channels"):
        other.load_state_dict(fresh.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        kind(net.parameters()).load_state_dict(optimizer.state_dict())


def test_multipliers_take_little_memory():
    """At most 0.1 % of the parameters, counting the scales that are kept and the numbers made from them."""
    from repkern import create_model
    from repkern.models.checkpoints.scales import SCALE_NAMES
    from repkern.optim import from_scales
    from repkern.optim.scales import layers_of

    with torch.device("meta"):
        model = create_model("repopt_vgg_b1")
    scales = {
        f"{layer.name}.{part}": torch.ones(layer.weight.shape[0])
        for layer in layers_of(model)
        for part in SCALE_NAMES
        if part != "identity_scale" or layer.keeps_positions
    }
    optimizer = from_scales(model, scales, lr=0.1, initialize="none")
    assert len(optimizer.grad_mults) == 28
    numbers = 0
    for parameter, mult in optimizer.grad_mults.items():
        made_of = optimizer._multiplier(parameter, optimizer.param_groups[0])
        vectors = (mult.conv_scale, mult.pointwise_scale, made_of.scale, made_of.centre)
        assert all(vector.dtype is torch.float32 for vector in vectors)
        numbers += sum(vector.numel() for vector in vectors)
    assert numbers <= 0.001 * sum(p.numel() for p in model.parameters())
