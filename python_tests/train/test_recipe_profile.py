import pytest
import torch
from torch import nn
from torch.nn import functional

import repkern
from repkern.models.digits import DigitsNet
from repkern.models.small_vgg import SmallVGG
from repkern.train.measure import resident_bytes, training_memory, training_step
from repkern.train.profile import estimate_memory, profile_layers

BOUND = 0.10  # of the measured memory: docs/recipes.md says so


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)


def adamw(model):
    return torch.optim.AdamW(model.parameters())


def rmsprop(model):
    return torch.optim.RMSprop(model.parameters())


CASES = {
    "resnet18": (lambda: repkern.create_model("resnet18", num_classes=10), (3, 32, 32), 16, sgd),
    "resnet18_dbb": (lambda: repkern.create_model("resnet18", block="dbb", width=0.5), (3, 32, 32), 8, sgd),
    "repvgg_a0": (lambda: repkern.create_model("repvgg_a0", num_classes=10), (3, 64, 64), 16, sgd),
    "repvgg_a0_cheap": (lambda: repkern.create_model("repvgg_a0", recompute="cheap"), (3, 64, 64), 16, sgd),
    "orepa": (lambda: SmallVGG(block="orepa"), (1, 28, 28), 64, sgd),
    "orepa_vgg": (lambda: SmallVGG(block="orepa_vgg"), (1, 28, 28), 32, sgd),
    "acb": (lambda: SmallVGG(block="acb"), (1, 28, 28), 32, adamw),
    "digits_orepa": (lambda: repkern.replace_convs(DigitsNet()), (1, 8, 8), 64, rmsprop),
}


@pytest.mark.unguarded  # guarded outputs are kept to the end of the test
@pytest.mark.parametrize("name", CASES)
def test_the_estimated_memory_is_near_the_measured_one(name):
    make, shape, batch, optimizer = CASES[name]
    model = make()
    estimate = estimate_memory(model, shape, batch, optimizer)
    made = optimizer(model)
    images, labels = torch.randn(batch, *shape), torch.zeros(batch, dtype=torch.long)
    measured = training_memory(model, made, training_step(model, made, functional.cross_entropy, images, labels), "cpu")
    assert abs(estimate.total - measured) <= BOUND * measured, (estimate, measured)
    assert estimate.weights + estimate.optimizer == resident_bytes(model, made)
    assert estimate.kept < estimate.step


def test_the_estimate_grows_with_what_it_should():
    def of(batch=32, **more):
        return estimate_memory(SmallVGG(), (1, 16, 16), batch, sgd, **more)

    base = of()
    assert of(ema=True).total == base.total + base.weights
    assert 1.9 * base.kept < of(64).kept < 2.1 * base.kept
    assert of(64, accumulate=2).kept == base.kept
    assert base.step < of(64, accumulate=2).step < of(64).step  # gradients stay between the pieces
    frozen = SmallVGG()
    frozen.stem.requires_grad_(False)
    assert estimate_memory(frozen, (1, 16, 16), 32, sgd).optimizer < base.optimizer


def test_the_model_itself_is_left_alone():
    model = SmallVGG()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimate_memory(model.eval(), (1, 16, 16), 8, sgd)
    profile_layers(model, (1, 16, 16))
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_are_those_of_the_network():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )
    conv, norm, relu, flatten, linear = profile_layers(model, (3, 8, 8))
    assert (conv.name, conv.kind, conv.parameters, conv.output) == ("0", "Conv2d", 224, (8, 4, 4))
    assert conv.multiply_adds == 3 * 9 * 8 * 16
    assert (norm.parameters, norm.multiply_adds, relu.output, flatten.output) == (16, 0, (8, 4, 4), (128,))
    assert (linear.multiply_adds, linear.output) == (128 * 5, (5,))


@pytest.mark.parametrize(
    ("name", "params", "multiply_adds"),
    [("resnet18", 11.68e6, 1.8e9), ("repvgg_a0", 9.11e6, 1.5e9), ("repvgg_b3", 123.09e6, 29e9)],
)
def test_totals_are_those_of_the_papers(name, params, multiply_adds):
    with torch.device("meta"):
        model = repkern.create_model(name)
    layers = profile_layers(model, (3, 224, 224))
    assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in model.parameters())
    assert sum(layer.parameters for layer in layers) == pytest.approx(params, rel=0.01)
    assert sum(layer.multiply_adds for layer in layers) == pytest.approx(multiply_adds, rel=0.05)


def test_blocks_are_one_row_and_cost_what_their_branches_do():
    rows = {layer.name: layer for layer in profile_layers(SmallVGG((8,), 2, block="repvgg"), (1, 8, 8))}
    assert list(rows) == ["stem", "stages.0.0", "stages.0.1", "head"]
    assert rows["stages.0.0"].kind == "RepVGGBlock"
    assert rows["stages.0.0"].multiply_adds == 8 * 8 * 64 * (9 + 1)
    assert rows["stages.0.0"].parameters == 8 * 8 * 10 + 3 * 2 * 8


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match=r"image_shape must be three sizes of at least 1: \[C, H, W\], got \[3, 32\]"):
        profile_layers(SmallVGG(), (3, 32))
    with pytest.raises(ValueError, match=r"does not take images of 3x32x32: "):
        profile_layers(SmallVGG(), (3, 32, 32))
    with pytest.raises(ValueError, match=r"multiple of accumulate, got 3 and 2"):
        estimate_memory(SmallVGG(), (1, 8, 8), 3, sgd, accumulate=2)
