"""group_squeeze: one squeeze for the whole model, the same numbers, whatever runs the model."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from repkern import reparameterize
from repkern.nn import OREPABlock, OREPAConv2d, OREPADeepStem, group_squeeze, ungroup_squeeze
from repkern.nn import group as group_module
from repkern.nn import orepa as orepa_module


class Net(nn.Module):
    """A normed block, a deep stem and a convolution that runs twice; the middle may be checkpointed."""

    def __init__(self):
        super().__init__()
        self.block = OREPABlock(4, 4, 3)
        self.stem = OREPADeepStem(4, 4, 5)
        self.conv = OREPAConv2d(4, 4, 3, padding=1)
        self.reentrant = None

    def middle(self, x):
        return self.conv(torch.tanh(self.conv(self.stem(x))))

    def forward(self, x):
        x = self.block(x)
        return self.middle(x) if self.reentrant is None else checkpoint(self.middle, x, use_reentrant=self.reentrant)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each squeeze had, by who asked."""
    counted = {"model": [], "conv": []}
    for name, module in (("model", group_module), ("conv", orepa_module)):
        squeeze = module.orepa_squeeze_many

        def counting(layers, _squeeze=squeeze, _name=name, **keywords):
            counted[_name].append(len(layers))
            return _squeeze(layers, **keywords)

        monkeypatch.setattr(module, "orepa_squeeze_many", counting)
    return counted


def images(seed=0, dtype=torch.float64):
    return torch.randn(2, 4, 7, 7, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def pair():
    """The same model twice, ungrouped and grouped."""
    plain = Net().double()
    return plain, group_squeeze(copy.deepcopy(plain))


def assert_same_gradients(grouped, plain):
    for (name, one), other in zip(grouped.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other[1].grad, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def test_one_squeeze_a_forward(calls):
    plain, grouped = pair()
    assert torch.equal(grouped(images()), plain(images()))
    assert calls["model"] == [4]
    calls["conv"].clear()
    grouped(images())
    assert calls == {"model": [4, 4], "conv": []}
    assert all(module.grouped is None for module in grouped.modules() if isinstance(module, OREPAConv2d))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients(train, reentrant, calls):
    plain, grouped = pair()
    for model in (plain, grouped):
        model.train(train)
        model(images().requires_grad_()).square().sum().backward()
    grouped.zero_grad(), plain.zero_grad()
    calls["model"].clear()
    grouped.reentrant = reentrant
    for model in (plain, grouped):
        model(images(1).requires_grad_()).square().sum().backward()
    assert_same_gradients(grouped, plain)
    assert calls["model"] == [4]


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_frozen_convolutions_get_no_gradient_work(reentrant, calls):
    plain, grouped = pair()
    for model in (plain, grouped):
        model.conv.requires_grad_(False)
        model.reentrant = reentrant
        model(images().requires_grad_()).square().sum().backward()
    for (name, one), other in zip(grouped.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == name.startswith("conv."), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14, msg=name)
    assert calls["model"] == [3, 1]


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_several_forwards_and_an_accumulated_backward(reentrant):
    plain, grouped = pair()
    grouped.reentrant = reentrant
    for model in (plain, grouped):
        first, second = model(images().requires_grad_()), model(images(1).requires_grad_())
        (first * second).sum().backward()
        model(images(2).requires_grad_()).sum().backward()
    assert_same_gradients(grouped, plain)


def test_a_step_changes_the_next_kernel():
    plain, grouped = pair()
    for model in (plain, grouped):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(3):
            optimizer.zero_grad()
            model(images(step)).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(grouped(images()), plain(images()), rtol=1e-10, atol=1e-12)


def test_other_modes_inside_the_forward():
    """A convolution under another gradient or autocast mode than the model's squeezes itself."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (OREPAConv2d(4, 4, 3) for _ in range(3))

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                x = self.first(x)
            with torch.autocast("cpu", torch.float16):
                x = self.second(x)
            with torch.enable_grad():
                return self.third(x.float())

    model = group_squeeze(Mixed())
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).requires_grad
    with torch.no_grad():
        output = model(x)
    output.sum().backward()
    assert model.third.origin.weight.grad.any()
    assert model.first.origin.weight.grad is None


def test_autocast_needs_no_second_squeeze(calls):
    plain = Net()
    grouped = group_squeeze(copy.deepcopy(plain))
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped(x), plain(x))
        calls["conv"].clear()
        grouped(x)
    # two launches: the stem's factor keeps float32, the others' kernels are bfloat16
    assert calls == {"model": [2, 2, 2, 2], "conv": []}


def test_a_convolution_called_alone():
    _, grouped = pair()
    grouped(images())
    expected = grouped.conv.fuse()(images())
    assert torch.equal(grouped.conv(images()), expected)


def test_kernels_go_when_the_forward_raises():
    _, grouped = pair()
    with pytest.raises(ValueError, match="got"):
        grouped(torch.zeros(1, 4, 7, dtype=torch.float64))
    assert grouped.conv.grouped is None


def test_channels_last_from_the_second_forward_on(calls):
    grouped = group_squeeze(nn.Sequential(OREPAConv2d(4, 4, 3), OREPAConv2d(4, 4, 3)))
    x = images(dtype=torch.float32).to(memory_format=torch.channels_last)
    first, second = grouped(x), grouped(x)
    assert torch.equal(first, second)
    assert grouped[0].last_format is torch.channels_last
    assert calls == {"model": [2, 2], "conv": []}


def test_copies_pickles_and_new_parts(calls):
    plain, grouped = pair()
    grouped(images())
    for other in (copy.deepcopy(grouped), pickle.loads(pickle.dumps(grouped))):
        calls["model"].clear()
        other.conv.bias.data.add_(1)
        assert not torch.equal(other(images()), plain(images()))
        assert calls["model"] == [4]
    grouped.conv = copy.deepcopy(plain.conv).requires_grad_(False)
    assert torch.equal(grouped(images()), plain(images()))


def test_undone_alone_and_by_reparameterize(calls):
    plain, grouped = pair()
    for model in (plain, grouped):
        model(images())
        model.eval()
    calls["model"].clear()
    deployed = reparameterize(grouped)
    torch.testing.assert_close(deployed(images()), plain(images()), rtol=1e-12, atol=1e-12)
    assert calls["model"] == []
    group_squeeze(group_squeeze(grouped))(images())
    assert calls["model"] == [4]
    ungroup_squeeze(grouped)(images())
    assert calls["model"] == [4]
    assert not deployed._forward_pre_hooks


def test_nothing_to_group():
    with pytest.warns(UserWarning, match="Linear has no OREPAConv2d"):
        group_squeeze(nn.Linear(2, 2))


# Dynamo looks at .grad of the kernels it gets and hides this warning itself, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled():
    plain, grouped = pair()
    compiled = torch.compile(grouped, fullgraph=True, backend="aot_eager")
    compiled(images()).square().sum().backward()
    plain(images()).square().sum().backward()
    assert_same_gradients(grouped, plain)
