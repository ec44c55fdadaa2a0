"""optimize_for_inference keeps what a model computes, whatever the model, and what it returns can be used as one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import repkern
from repkern.deploy import InferenceConv2d
from repkern.deploy._methods import METHODS

FAMILIES = [
    "repvgg_a0",
    "repvgg_b1g4",
    "repvgg_d2se",
    "repopt_vgg_b1",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "vgg16_cifar",
    "mobilenet_v1",
    "mobileone_s0",
    "repghostnet_050",
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPKERN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _untimed(request, monkeypatch):
    """Timing every method of every layer takes seconds; tests of what is computed pick a method by its name instead."""
    if request.node.get_closest_marker("timed"):
        return
    monkeypatch.setattr("repkern.deploy._choice.time_calls", lambda calls, x: {name: _TIMES[name] for name in calls})


_TIMES = {name: 1.0 + 0.01 * at for at, name in enumerate(METHODS)}


@pytest.fixture
def prefer(monkeypatch):
    """Makes a method the fastest one wherever it can run."""
    return lambda *names: [monkeypatch.setitem(_TIMES, name, 0.1 + 0.01 * at) for at, name in enumerate(names)]


def close(got, wanted, limit=1e-5):
    assert type(got) is type(wanted)
    if isinstance(wanted, list | tuple):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            close(one, other, limit)
        return
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert got.stride() == wanted.stride()
    assert float((got - wanted).abs().max()) <= limit * float(wanted.abs().max())


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, InferenceConv2d)]


def small_net(randomize, activation=nn.ReLU):
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            activation(),
            nn.Conv2d(16, 24, 3, padding=1, bias=False),
            nn.BatchNorm2d(24),
            activation(),
            nn.Conv2d(24, 24, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 5),
        )
    )


def test_every_family_is_here():
    families = {type(repkern.create_model(name, width=0.125, num_classes=2)) for name in FAMILIES}
    some = {type(repkern.create_model(name, width=0.125, num_classes=2)) for name in repkern.list_models("*[0a8t1]")}
    assert some <= families


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_compute_the_same(name, randomize, prefer):
    prefer("winograd F4", "direct split", "direct fma")
    model = randomize(repkern.create_model(name, width=0.125, num_classes=7))
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x)
    fast = repkern.optimize_for_inference(model, x)
    close(fast(x), wanted)
    report = fast.report
    assert report.traced
    assert report.channels_last
    assert report.difference <= 1e-5
    assert not report.kept
    assert any(layer.method != "torch" for layer in report.layers)
    plain = repkern.reparameterize(model)
    if not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules()):
        fast.load_state_dict(plain.state_dict(), strict=True)
        close(fast(x), wanted)
    assert len(list(model.modules())) == len(list(copy.deepcopy(model).modules()))


def test_the_given_model_is_untouched(randomize):
    model = small_net(randomize).train().requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    repkern.optimize_for_inference(model, torch.randn(1, 3, 16, 16))
    assert [type(module) for module in model.modules()] == kinds
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "torch"])
def test_every_method(method, randomize, prefer):
    prefer(method)
    model = small_net(randomize)
    x = torch.randn(2, 3, 33, 30)
    wanted = model(x)
    fast = repkern.optimize_for_inference(model, x, methods=[method], memory=None, accuracy="fast")
    used = [layer.method for layer in layers_of(fast)]
    possible = any(METHODS[method].why_not(layer.spec, _maps()) is None for layer in layers_of(fast))
    assert (method in used) == possible
    close(fast(x), wanted, 1e-4 if "F6" in method else 1e-5)
    fresh = repkern.optimize_for_inference(small_net(randomize), x, methods=[], memory=None)
    fresh.load_state_dict(fast.state_dict(), strict=True)
    close(fresh(x), wanted)
    fast.load_state_dict(fresh.state_dict(), strict=True)
    close(fast(x), wanted, 1e-4 if "F6" in method else 1e-5)


def _maps():
    from repkern.deploy._methods import Maps

    return Maps(torch.float32, torch.device("cpu"), True)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize("method", ["torch", "onednn", "winograd F2"])
def test_activations_are_fused(activation, method, randomize, prefer):
    prefer(method)
    model = small_net(randomize, activation)
    x = 3 * torch.randn(1, 3, 16, 16)
    fast = repkern.optimize_for_inference(model, x)
    close(fast(x), model(x))
    assert [layer.fused for layer in fast.report.layers] == [["BatchNorm", activation.__name__.lower()]] * 2 + [[], []]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(8))

    def forward(self, x):
        one, two, three, four, five, six, seven, eight = self.convs
        x = functional.relu(one(x), inplace=True)
        x = functional.relu6(two(x))
        x = functional.silu(three(x))
        x = functional.hardswish(four(x))
        x = torch.relu(five(x))
        x = six(x).relu()
        x = seven(x).relu_()
        return functional.dropout(eight(x), 0.5, self.training)


def test_functional_activations_are_fused(randomize):
    model, x = randomize(Functional()), torch.randn(1, 8, 12, 12)
    fast = repkern.optimize_for_inference(model, x)
    close(fast(x), model(x))
    kinds = [layer.fused for layer in fast.report.layers]
    assert kinds == [["relu"], ["relu6"], ["silu"], ["hardswish"], ["relu"], ["relu"], ["relu"], []]


class BasicBlock(nn.Module):
    """As torchvision writes it."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 16, 1))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.fc = nn.Linear(128, 10)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        x = x.view(x.size(0), -1)  # fails on channels_last maps
        return self.fc(x)


@pytest.mark.parametrize("method", ["torch", "onednn", "onednn packed", "winograd F4", "direct fma"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_residual_networks(method, form, randomize, prefer):
    prefer(method)
    model = randomize(ResNet())
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x)
    fast = repkern.optimize_for_inference(model, x, memory=None)
    close(fast(x.contiguous(memory_format=form)), wanted)
    fused = {layer.name: layer.fused for layer in fast.report.layers}
    assert fused["layer1.0.conv1"] == ["BatchNorm", "relu"]
    assert fused["layer2.0.conv2"] == ["BatchNorm", "add", "relu"]
    assert fused["layer2.0.downsample.0"] == ["BatchNorm"]
    calls = [node for node in fast._body.graph.nodes if node.op not in ("placeholder", "output")]
    assert sum(isinstance(fast.get_submodule(str(node.target)), InferenceConv2d) for node in calls[:11]) == 10


def test_other_sizes_than_the_example(randomize, prefer):
    prefer("winograd F4", "direct fma")
    model = randomize(ResNet())
    fast = repkern.optimize_for_inference(model, torch.randn(1, 3, 64, 64))
    for shape in ((1, 3, 32, 48), (3, 3, 64, 64), (2, 3, 97, 41)):
        x = torch.randn(shape)
        close(fast(x), model(x))


def test_an_empty_batch(randomize, prefer):
    prefer("winograd F4", "direct fma")
    model = small_net(randomize)
    fast = repkern.optimize_for_inference(model, torch.randn(1, 3, 16, 16))
    assert fast(torch.empty(0, 3, 16, 16)).shape == (0, 5)


def test_autocast_around_it(randomize, prefer):
    prefer("winograd F4")
    model, x = small_net(randomize), torch.randn(2, 3, 16, 16)
    fast, wanted = repkern.optimize_for_inference(model, x), model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = fast(x)
    assert float((got.float() - wanted).abs().max()) <= 0.05 * float(wanted.abs().max())


def test_vmap(randomize, prefer):
    prefer("winograd F4")
    model, x = small_net(randomize), torch.randn(2, 3, 16, 16)
    fast = repkern.optimize_for_inference(model, x)
    close(torch.func.vmap(fast)(x[:, None])[:, 0], model(x))
