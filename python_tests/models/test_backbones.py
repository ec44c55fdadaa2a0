"""Networks as backbones: feature maps, output strides, and the segmentation head over them."""

import pytest
import torch
from torch import nn

import repkern
from repkern.models import PSPNet

NARROW = 0.125
FAMILIES = ("repvgg_a0", "repvgg_b1g4", "resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v1", "mobileone_s0",
            "repghostnet_050", "vgg16_cifar")  # fmt: skip
REDUCTIONS = {"vgg16_cifar": [1, 2, 4, 8, 16]}


def make(name, **options):
    return repkern.create_model(name, width=NARROW, **options)


def images(batch=1, size=64):
    return torch.randn(batch, 3, size, size + 32, dtype=torch.float64)


@torch.no_grad()
def randomized(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.num_batches_tracked.fill_(1)
    return model.double().eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_maps(name):
    model = randomized(make(name, features_only=True))
    classifier = make(name).double().eval()
    missing = classifier.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    x = images()
    with torch.no_grad():
        maps = model(x)
        taps = classifier.forward_taps(x)
    assert [info.reduction for info in model.feature_info] == REDUCTIONS.get(name, [2, 4, 8, 16, 32])
    for info, one, other in zip(model.feature_info, maps, taps, strict=True):
        assert one.shape == (1, info.channels, 64 // info.reduction, 96 // info.reduction)
        assert torch.equal(one, other)
    assert model.feature_info == classifier.feature_info


def test_out_indices_pick_order_and_depth():
    whole = randomized(make("resnet18", features_only=True))
    some = make("resnet18", features_only=True, out_indices=(2, 0, -2)).double().eval()
    state = whole.state_dict()
    some.load_state_dict({name: state[name] for name in some.state_dict()})
    x = images()
    with torch.no_grad():
        expected, got = whole(x), some(x)
    assert [info.module for info in some.feature_info] == ["stages.1", "stem", "stages.2"]
    for one, index in zip(got, (2, 0, 3), strict=True):
        assert torch.equal(one, expected[index])
    assert len(some.stages) == 3
    assert not any(name.startswith(("stages.3", "head")) for name in some.state_dict())


def without_squeeze_excite(model):
    """It averages over all pixels of the map, of which the dilated network has more."""
    for module in model.modules():
        if getattr(module, "se", None) is not None:
            module.se = None


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", FAMILIES)
def test_dilated_maps_have_the_strided_ones_in_them(name, output_stride):
    """Dropping a stride and dilating what follows computes the same values, and more between them."""
    strided = randomized(make(name, features_only=True))
    dilated = make(name, features_only=True, output_stride=output_stride).double().eval()
    dilated.load_state_dict(strided.state_dict(), strict=True)
    for model in (strided, dilated):
        without_squeeze_excite(model)
    x = images()
    with torch.no_grad():
        coarse, fine = strided(x), dilated(x)
    for one, other, before, now in zip(coarse, fine, strided.feature_info, dilated.feature_info, strict=True):
        assert now.reduction == min(before.reduction, output_stride)
        step = before.reduction // now.reduction
        assert other.shape[-2:] == (64 // now.reduction, 96 // now.reduction)
        torch.testing.assert_close(other[..., ::step, ::step], one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "block", ["repvgg", "orepa_vgg", "qarepvgg", "csla", "mobileone", "dyrep", "dbb", "acb", "orepa"]
)
@pytest.mark.parametrize("name", ["repvgg_a0", "resnet50"])
def test_output_stride_keeps_weights_and_conversion(name, block):
    """A stage whose stride is gone could have an identity branch; it must not, or weights would not load."""
    strided = make(name, block=block)
    dilated = make(name, block=block, output_stride=8)
    assert {k: v.shape for k, v in strided.state_dict().items()} == {
        k: v.shape for k, v in dilated.state_dict().items()
    }
    randomized(dilated)
    plain = repkern.reparameterize(dilated)
    x = images()
    with torch.no_grad():
        expected, got = dilated.forward_features(x), plain.forward_features(x)
    assert expected.shape[-2:] == (8, 12)
    assert float((got - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    fresh = make(name, block="plain", output_stride=8).double()
    fresh.load_state_dict(plain.state_dict(), strict=True)


def dilations(model):
    return [conv.dilation[0] for conv in model.modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)]


def test_the_fast_variants_dilate_five_layers():
    usual = repkern.create_model("repvgg_b1g2", block="plain", width=NARROW, output_stride=8)
    fast = repkern.create_model("repvgg_b1g2", block="plain", width=NARROW, output_stride=8, dilated_layers=5)
    assert dilations(usual) == [1] * 11 + [1] + [2] * 15 + [2]
    assert dilations(fast) == [1] * 23 + [2] * 4 + [2]
    strides = [conv.stride[0] for conv in fast.modules() if isinstance(conv, nn.Conv2d)]
    assert strides.count(2) == 3


@pytest.mark.parametrize(("name", "options"), [("repvgg_b1g2", {"fast": True}), ("resnet50", {"block": "dbb"})])
def test_pspnet(name, options):
    model = PSPNet.from_name(name, 5, width=NARROW, **options)
    x = torch.randn(2, 3, 65, 73)
    scores, auxiliary = model.train()(x)
    assert scores.shape == auxiliary.shape == (2, 5, 65, 73)
    loss = sum(nn.functional.cross_entropy(s, torch.zeros(2, 65, 73, dtype=torch.long)) for s in (scores, auxiliary))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    randomized(model)
    x = x.double()
    plain = repkern.reparameterize(model)
    with torch.no_grad():
        expected, got = model(x), plain(x)
    assert expected.shape == (2, 5, 65, 73)
    assert float((got - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    fresh = PSPNet.from_name(name, 5, width=NARROW, **{**options, "block": "plain"}).double()
    fresh.load_state_dict(plain.state_dict(), strict=True)


def test_pyramid_pooling_of_a_constant_map_is_constant():
    pyramid = repkern.models.pspnet.PyramidPooling(8, (1, 2)).eval()
    out = pyramid(torch.ones(1, 8, 6, 10))
    assert out.shape == (1, 16, 6, 10)
    assert float(out.detach().std(dim=(2, 3)).max()) < 1e-6
    with pytest.raises(ValueError, match="bins must be positive"):
        repkern.models.pspnet.PyramidPooling(8, (0, 2))


def test_pspnet_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="features_only=True"):
        PSPNet(make("resnet18"))
    with pytest.raises(ValueError, match="two feature maps"):
        PSPNet(make("resnet18", features_only=True, out_indices=(-1,)))
    with pytest.raises(ValueError, match="fast=True is defined for RepVGG networks, got 'resnet18'"):
        PSPNet.from_name("resnet18", width=NARROW, fast=True)
