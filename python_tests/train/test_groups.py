"""Which parameter is trained how: weight decay, learning rate, frozen ones, and their state by name."""

import pytest
import torch
from small_training import recipe
from torch import nn

from repkern.models.small_vgg import SmallVGG
from repkern.nn import custom_l2_parameters
from repkern.train.callbacks import StructureChanged
from repkern.train.optimizers import (
    follow_structure,
    load_optimizer,
    make_optimizer,
    optimizer_state,
    parameter_groups,
)
from repkern.train.schedule import Schedule

DECAY = 0.01


def network(block="repvgg"):
    torch.manual_seed(0)
    return SmallVGG((4,), 2, block=block)


def optimizer(model, **wanted):
    return make_optimizer(model, recipe(optimizer={"weight_decay": DECAY, **wanted}))


def decays(model, loss=None, **wanted):
    """Name -> decay of every parameter."""
    groups = parameter_groups(model, recipe(optimizer={"weight_decay": DECAY, **wanted}, loss=loss or {}))
    return {name: group["weight_decay"] for group in groups for name, _ in group["params"]}


def by_name(optimizer):
    return {name: p for g in optimizer.param_groups for name, p in zip(g["param_names"], g["params"], strict=True)}


@pytest.mark.parametrize("block", ["conv_bn", "repvgg", "acb", "dbb", "orepa"])
def test_kernels_decay_and_norms_biases_and_scales_do_not(block):
    model = network(block)
    found = decays(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    norms = {f"{path}." for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, p in model.named_parameters():
        is_norm = (any(name.startswith(path) for path in norms) or p.dim() < 2) and not name.endswith(
            "identity_bn.weight"
        )
        assert found[name] == (0 if is_norm else DECAY), name


def test_scales_of_orepa_decay_when_asked():
    found, plain = decays(network("orepa"), decay_scales=True), decays(network("orepa"))
    differing = {name for name in found if found[name] != plain[name]}
    assert differing
    assert all("scale" in name and found[name] == DECAY for name in differing)


def test_all_decay_when_asked():
    assert set(decays(network(), decay_all=True).values()) == {DECAY}


@pytest.mark.parametrize("wanted", [{}, {"decay_all": True}])
def test_what_the_custom_l2_covers_does_not_decay(wanted):
    model = network()
    covered = {id(p) for p in custom_l2_parameters(model)}
    found = decays(model, loss={"custom_l2": True}, **wanted)
    plain = decays(model, **wanted)
    names = {name: id(p) in covered for name, p in model.named_parameters()}
    assert sum(names.values()) == 6  # a 3x3 and a 1x1 kernel in each of three blocks
    assert found == {name: 0 if names[name] else decay for name, decay in plain.items()}


def test_identity_branches_decay_as_in_the_release():
    model = SmallVGG((4, 4), 2, block="csla")
    identities = [name for name in decays(model) if "identity" in name]
    assert identities
    assert {decays(model)[name] for name in identities} == {DECAY}


def test_learning_rates_by_name_the_first_pattern_wins():
    weights = optimizer(network(), lr=0.2, layer_lr={"stem.*": 0.1, "*.weight": 0.5})
    rates = {name: g["lr"] for g in weights.param_groups for name in g["param_names"]}
    for name, rate in rates.items():
        wanted = 0.1 if name.startswith("stem.") else 0.5 if name.endswith(".weight") else 1.0
        assert rate == pytest.approx(0.2 * wanted), name


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"layer_lr: 'stme\.\*' matches no trained parameter; there are stem\."):
        optimizer(network(), layer_lr={"stme.*": 0.1})


def test_frozen_parameters_are_in_no_group():
    model = network()
    model.stem.requires_grad_(False)
    assert not any(name.startswith("stem") for name in decays(model))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        decays(model)


@pytest.mark.parametrize(
    ("name", "kind", "checked"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-6}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.8, "eps": 1e-6}),
    ],
)
def test_options_reach_the_optimizer(name, kind, checked):
    weights = optimizer(network(), name=name, momentum=0.8, betas=(0.8, 0.9), eps=1e-6)
    assert type(weights) is kind
    assert all(weights.defaults[option] == value for option, value in checked.items())


def test_sgd_without_momentum_needs_no_nesterov():
    assert not optimizer(network(), momentum=0.0).defaults["nesterov"]


def stepped(model, weights, steps=2):
    for step in range(steps):
        weights.zero_grad()
        model(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        weights.step()


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_state_goes_by_name_whatever_the_order_of_the_groups(name):
    model = network()
    weights = optimizer(model, name=name)
    stepped(model, weights)
    saved = optimizer_state(weights, dict(model.named_parameters()))
    wanted = {
        n: {k: torch.as_tensor(v).clone() for k, v in weights.state[p].items()} for n, p in by_name(weights).items()
    }
    other = network()
    again = optimizer(other, name=name)
    for group in again.param_groups:
        group["params"].reverse()
        group["param_names"].reverse()
    load_optimizer(again, saved, dict(other.named_parameters()))
    for n, p in by_name(again).items():
        assert p is dict(other.named_parameters())[n]
        assert all(torch.equal(torch.as_tensor(again.state[p][k]), v) for k, v in wanted[n].items())


def test_parameters_without_a_name_are_an_error():
    model = network()
    with pytest.raises(ValueError, match=r"group 0 of SGD has \d+ parameters that the network lacks"):
        optimizer_state(optimizer(model), dict(network().named_parameters()))


def test_state_of_other_parameters_is_an_error_by_name():
    model = network()
    saved = optimizer_state(optimizer(model), dict(model.named_parameters()))
    less = network()
    less.head = nn.Identity()
    with pytest.raises(ValueError, match=r"the optimizer trained head\.\w+ \(and 1 more\), which the model has not"):
        load_optimizer(optimizer(less), saved, dict(less.named_parameters()))
    frozen = network()
    frozen.head.requires_grad_(False)
    saved = optimizer_state(optimizer(frozen), dict(frozen.named_parameters()))
    whole = network()
    with pytest.raises(ValueError, match=r"the saved optimizer did not train head\.\w+ \(and 1 more\)"):
        load_optimizer(optimizer(whole), saved, dict(whole.named_parameters()))


def test_a_change_of_the_network_keeps_the_state_of_what_stays():
    model = network("conv_bn")
    weights = optimizer(model, lr=0.1, layer_lr={"stem.*": 0.5})
    Schedule(weights, recipe().schedule, steps=10, steps_per_epoch=5)
    stepped(model, weights)
    kept = {n: weights.state[p]["momentum_buffer"] for n, p in by_name(weights).items() if not n.startswith("head")}
    gone = list(model.head.parameters())
    model.head = nn.Linear(4, 10)
    momentum = torch.ones(10, 4)
    settings = recipe(optimizer={"weight_decay": DECAY, "lr": 0.1, "layer_lr": {"stem.*": 0.5}})
    change = StructureChanged(("head",), state={model.head.weight: {"momentum_buffer": momentum}})
    follow_structure(weights, model, change, settings)
    found = by_name(weights)
    assert {n: id(p) for n, p in found.items()} == {n: id(p) for n, p in model.named_parameters()}
    assert all(weights.state[found[n]]["momentum_buffer"] is buffer for n, buffer in kept.items())
    assert not any(p in weights.state for p in gone)
    assert weights.state[model.head.weight]["momentum_buffer"] is momentum
    assert model.head.bias not in weights.state
    decay = {name: g["weight_decay"] for g in weights.param_groups for name in g["param_names"]}
    assert (decay["head.weight"], decay["head.bias"]) == (DECAY, 0)
    stepped(model, weights)


def test_new_parameters_get_a_group_when_none_fits():
    model = network("conv_bn")
    weights = optimizer(model, layer_lr={})
    Schedule(weights, recipe().schedule, steps=10, steps_per_epoch=5)
    model.head = nn.Linear(4, 10)
    settings = recipe(optimizer={"weight_decay": DECAY, "lr": 0.1, "layer_lr": {"head.*": 3.0}})
    follow_structure(weights, model, StructureChanged(("head",)), settings)
    rates = {name: g["initial_lr"] for g in weights.param_groups for name in g["param_names"]}
    assert rates["head.weight"] == pytest.approx(0.3)
    saved = optimizer_state(weights, dict(model.named_parameters()))
    again = optimizer(model, layer_lr={})
    load_optimizer(again, saved, dict(model.named_parameters()))
    assert {n: g["initial_lr"] for g in again.param_groups for n in g["param_names"]} == rates


def test_a_repoptimizer_cannot_follow():
    from repkern.optim import RepSGD

    model = nn.Conv2d(3, 3, 3, bias=False)
    weights = RepSGD.__new__(RepSGD)
    with pytest.raises(ValueError, match="RepSGD cannot follow a change of the network: it has no multipliers"):
        follow_structure(weights, model, StructureChanged(("",)), recipe())
