"""from_scales: two lines for any network; ablations; scales that are not for it. Weight decay groups."""

import copy

import pytest
import torch
from torch import nn

from repkern import create_model
from repkern.models.digits import DigitsNet
from repkern.nn import ConvNormAct, CSLABlock
from repkern.nn.fold import identity_kernel, pad_to
from repkern.optim import (
    GradMult,
    RepAdamW,
    RepSGD,
    derived_scales,
    from_scales,
    grad_mults,
    reinitialize,
    weight_decay_groups,
)
from repkern.search import HyperSearch


class Foreign(nn.Module):
    """A network of somebody else: names, groups and norms in no order of ours."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 7, padding=3)
        self.one, self.one_norm = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.two, self.two_norm = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12)
        self.three, self.three_norm = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.out = nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x):
        x = self.one_norm(self.one(self.enter(x))).relu()
        x = self.two_norm(self.two(x)).relu()
        return self.out(self.three_norm(self.three(x)).relu()).mean((2, 3))


def random_scales(model, **options):
    """Scales as a search would leave them."""
    generator = torch.Generator().manual_seed(5)
    found = HyperSearch(model, **options).scales()
    return {name: 0.5 + torch.rand(s.shape, generator=generator) for name, s in found.items()}


def test_two_lines_train_any_network():
    torch.manual_seed(0)
    model = Foreign()
    scales = random_scales(model)
    optimizer = from_scales(model, scales, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    assert isinstance(optimizer, RepSGD)
    assert [id(weight) for weight in optimizer.grad_mults] == [
        id(model.one.weight),
        id(model.two.weight),
        id(model.three.weight),
    ]
    assert optimizer.grad_mults[model.one.weight] == GradMult(
        scales["one.dense_scale"], scales["one.pointwise_scale"], True, 2
    )
    assert optimizer.grad_mults[model.two.weight].identity is False
    x, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 4
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_eq_4():
    model = Foreign()
    scales, before = random_scales(model), copy.deepcopy(model.state_dict())
    optimizer = from_scales(model, scales, optimizer="adamw", lr=0.01, generator=torch.Generator().manual_seed(11))
    assert isinstance(optimizer, RepAdamW)
    generator = torch.Generator().manual_seed(11)
    for name, conv in (("one", model.one), ("two", model.two), ("three", model.three)):
        bound = conv.weight.shape[1] ** -0.5  # of a fresh nn.Conv2d with K = 1
        fresh = torch.empty(*conv.weight.shape[:2], 1, 1).uniform_(-bound, bound, generator=generator)
        s, t = (scales[f"{name}.{part}_scale"][:, None, None, None] for part in ("dense", "pointwise"))
        expected = s * before[f"{name}.weight"] + pad_to(t * fresh, 3)
        if name != "two":
            expected = expected + identity_kernel(conv.out_channels, 3, conv.groups)
        assert torch.allclose(conv.weight, expected, rtol=0, atol=1e-6), name
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items() if name.split(".")[0] in ("enter", "out"))
    assert torch.equal(model.two.bias, before["two.bias"])


def test_it_is_the_network_of_the_search_at_its_start():
    """Trained by one step of SGD, target and CSLA blocks stay the same function: names, groups and norms agree."""
    torch.manual_seed(0)
    model = create_model("repopt_vgg_b1", width=0.0625, num_classes=4).double()
    branches = create_model("repopt_vgg_b1", width=0.0625, num_classes=4, block="csla").double()
    search = HyperSearch(branches, initial="released", inplace=True)
    scales = {name: scale + 0.2 * torch.rand_like(scale) for name, scale in search.scales().items()}
    blocks = {name: block for name, block in branches.named_modules() if isinstance(block, CSLABlock)}
    with torch.no_grad():
        for name, block in blocks.items():
            for part in ("dense_scale", "pointwise_scale", "identity_scale"):
                if getattr(block, part) is not None:
                    getattr(block, part).weight.copy_(scales[f"{name}.{part}"])
                    getattr(block, part).weight.requires_grad_(part == "identity_scale")
            if block.identity_scale is not None:
                block.identity_scale.weight.fill_(1)
    optimizer = from_scales(model, scales, lr=0.01, momentum=0.9, initialize="none", weight_decay=1e-3)
    with torch.no_grad():
        for name, block in blocks.items():
            model.get_submodule(name).conv.weight.copy_(block.summed_kernel())
        model.head.load_state_dict(branches.head.state_dict())
    plain = torch.optim.SGD(weight_decay_groups(branches, 1e-3), 0.01, momentum=0.9)
    for _ in range(3):
        x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        outputs = [net(x) for net in (model, branches)]
        assert torch.allclose(*outputs, rtol=0, atol=1e-9 * outputs[1].abs().max().item())
        for own, output in zip((optimizer, plain), outputs, strict=True):
            own.zero_grad()
            output.square().mean().backward()
            own.step()
    assert not torch.allclose(model.stages[2][3].conv.weight, blocks["stages.2.3"].dense.weight)


def test_ablations_of_table_4():
    model = DigitsNet((4, 8), 1)
    scales = random_scales(model)
    weights = copy.deepcopy(model.state_dict())

    def kernel_and_mult(**options):
        model.load_state_dict(weights)
        optimizer = from_scales(model, scales, lr=0.1, generator=torch.Generator().manual_seed(1), **options)
        return model.stages[0].conv2.weight.detach().clone(), optimizer.grad_mults.get(model.stages[0].conv2.weight)

    full, mult = kernel_and_mult()
    kernel, kept = kernel_and_mult(initialize="none")
    assert torch.equal(kernel, weights["stages.0.conv2.weight"])
    assert kept == mult
    kernel, gone = kernel_and_mult(multiply=False)
    assert torch.equal(kernel, full)
    assert gone is None
    _, ones = kernel_and_mult(constants="ones")
    assert ones == GradMult(torch.ones(4), torch.ones(4), True)
    _, initial = kernel_and_mult(constants="initial")  # the third of its stage: stem, conv1, conv2
    assert initial == GradMult(torch.full((4,), (2 / 3) ** 0.5), torch.full((4,), (2 / 3) ** 0.5), True)
    _, released = kernel_and_mult(constants="initial", initial="released")
    assert released == GradMult(torch.ones(4), torch.ones(4), True)
    _, averaged = kernel_and_mult(constants="averaged")
    s, t = (scales[f"stages.0.conv2.{part}_scale"].mean().expand(4) for part in ("dense", "pointwise"))
    assert averaged == GradMult(s, t, True)
    trained, _ = kernel_and_mult(initialize="trained_identity")
    moved = torch.diagonal((trained - full)[:, :, 1, 1])
    assert torch.allclose(moved, scales["stages.0.conv2.identity_scale"] - 1, atol=1e-6)


def test_scales_of_a_network_are_for_it_with_squeeze_excite():
    """Where a module follows the convolution, the layer's name is one longer."""
    plain, excited = (create_model(f"repopt_vgg_b1{se}", width=0.0625, num_classes=3) for se in ("", "_se"))
    scales, other = random_scales(plain), random_scales(excited)
    assert "stages.0.1.dense_scale" in scales
    assert "stages.0.1.conv.dense_scale" in other
    for model, found in ((excited, scales), (plain, other)):
        optimizer = from_scales(model, found, lr=0.1, constants="initial")
        assert len(optimizer.grad_mults) == 28
    assert len(HyperSearch(excited, initial=scales).scales()) == 79


def test_ghost_modules_have_two_branches():
    """RepOpt-GhostNet (Appendix D): a depthwise kernel and an identity, no 1x1."""
    model = create_model("repghostnet_050", block="conv_bn", num_classes=3)
    scales = random_scales(model, where="*.fusion", pointwise=False, initial="ones")
    assert len(scales) == 64
    optimizer = from_scales(model, scales, lr=0.1)
    assert len(optimizer.grad_mults) == 32
    mult = optimizer.grad_mults[model.stages[0][0].ghost1.fusion.conv.weight]
    assert (mult.pointwise_scale, mult.identity, mult.groups) == (None, True, len(mult.conv_scale))


def test_parts_alone():
    model = DigitsNet((4,), 1)
    scales = random_scales(model)
    assert list(grad_mults(model, scales)) == [
        model.stem[0].weight,
        model.stages[0].conv1.weight,
        model.stages[0].conv2.weight,
    ]
    before = model.stem[0].weight.clone()
    reinitialize(model, scales)
    assert not torch.equal(before, model.stem[0].weight)
    optimizer = from_scales(
        model,
        scales,
        lr=0.1,
        params=[
            {"params": model.head.parameters()},
            {"params": [*model.stem.parameters(), *model.stages.parameters()], "lr": 0.3},
        ],
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]


def refused(message, model, scales, **options):
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        from_scales(model, scales, lr=0.1, **options)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def test_scales_of_another_network():
    """The released loader keeps the start values instead; here the first mismatches are listed."""
    scales = random_scales(DigitsNet((4, 8), 1))
    refused(
        r"not for this DigitsNet \(13 mismatches\):\n  stem\.0\.dense_scale \(4,\): .* has 6 channels",
        DigitsNet((6, 12), 1),
        scales,
    )
    refused(r"stages\.2\.conv1: no scales, but other layers of its kind have them", DigitsNet((4, 8), 2), scales)
    refused(r"stages\.1\.conv1: the model has no such convolution", DigitsNet((4,), 1), scales)
    vgg = random_scales(create_model("repopt_vgg_b1", width=0.0625))
    refused(r"stages\.0\.4: no scales", create_model("repopt_vgg_l1", width=0.0625), vgg)


def test_scales_that_are_broken():
    model = DigitsNet((4,), 1)
    scales = random_scales(model)
    nan = {**scales, "stem.0.dense_scale": torch.tensor([1, 1, torch.nan, 1])}
    refused(r"stem\.0\.dense_scale is nan for channel 2", model, nan)
    refused(r"stem\.0: conv_scale is 0 for channel 0", model, {**scales, "stem.0.dense_scale": torch.zeros(4)})
    refused(
        r"stem\.0\.identity_scale: .* cannot have an identity",
        model,
        {**scales, "stem.0.identity_scale": torch.ones(4)},
    )
    bare = {name: s for name, s in scales.items() if name != "stages.0.conv1.dense_scale"}
    refused(r"layers without a dense_scale: stages\.0\.conv1", model, bare)
    half = {name: s for name, s in scales.items() if name != "stages.0.conv1.identity_scale"}
    refused(r"stages\.0\.conv1\.identity_scale: missing, but other layers have one", model, half)
    assert len(from_scales(model, half, lr=0.1, strict=False).grad_mults) == 3
    refused(r"scales are named LAYER\.dense_scale .*, got 'stem.0.weight'", model, {"stem.0.weight": torch.ones(4)})
    refused("there are no scales", model, {})
    with pytest.raises(TypeError, match=r"stem\.0\.dense_scale must be a tensor, got float"):
        from_scales(model, {"stem.0.dense_scale": 1.0}, lr=0.1)


def test_models_and_arguments_that_cannot_be():
    model = DigitsNet((4,), 1)
    scales = random_scales(model)
    refused("optimizer must be one of sgd, adamw, got 'adam'", model, scales, optimizer="adam")
    refused("initialize must be one of scales, trained_identity, none, got 'zeros'", model, scales, initialize="zeros")
    refused("constants must be one of searched, ones, initial, averaged, got 'two'", model, scales, constants="two")
    refused(
        "initial must be one of paper, released, ones, or a finite number",
        model,
        scales,
        constants="initial",
        initial="x",
    )
    refused("use the model before DataParallel wraps it", nn.DataParallel(model), scales)
    refused("has the branches that a RepOptimizer stands for", HyperSearch(model).model, scales)
    refused(
        "lr must be zero or more, got -1",
        model,
        scales,
        optimizer="sgd",
        params=[{"params": model.parameters(), "lr": -1.0}],
    )
    other = DigitsNet((4,), 1)
    refused(r"3 of 3 grad_mults are for parameters .* does not have", model, scales, params=other.parameters())
    with pytest.raises(TypeError, match="betas"):
        from_scales(model, scales, lr=0.1, betas=(0.9, 0.9))
    with pytest.raises(ValueError, match="depth: a model is needed"):
        derived_scales(scales, "initial")


def test_compiled_and_frozen_models():
    model = DigitsNet((4,), 1)
    scales = random_scales(model)
    model.stem[0].weight.requires_grad_(False)
    optimizer = from_scales(
        torch.compile(model, backend="eager"), {k: v for k, v in scales.items() if "stem" not in k}, lr=0.1
    )
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 7]


def test_weight_decay_groups():
    """The rule of the released training: an identity's norm or scale is that branch's kernel."""
    model = nn.Sequential(CSLABlock(4, 4, 3, train_scales="all"), ConvNormAct(4, 4, 3), nn.Linear(4, 2))
    model[1].conv.requires_grad_(False)
    decayed, others = weight_decay_groups(model, 0.1)
    assert [name for name, _ in decayed["params"]] == [
        "0.identity_scale.weight", "0.dense.weight", "0.pointwise.weight", "2.weight",
    ]  # fmt: skip
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {name for name, _ in others["params"]} == {
        "0.dense_scale.weight", "0.pointwise_scale.weight", "0.bn.weight", "0.bn.bias", "1.bn.weight", "1.bn.bias",
        "2.bias",
    }  # fmt: skip
    baseline = dict(weight_decay_groups(create_model("repvgg_a0", width=0.125), 0.1)[0]["params"])
    assert "stages.0.1.identity_bn.weight" in baseline
    assert "stages.0.1.dense_bn.weight" not in baseline
    with pytest.raises(ValueError, match=r"weight_decay must be zero or more, got -0\.1"):
        weight_decay_groups(model, -0.1)
    with pytest.raises(ValueError, match="Linear has no parameter that requires a gradient"):
        weight_decay_groups(nn.Linear(1, 1).requires_grad_(False), 0.1)
