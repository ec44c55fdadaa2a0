"""create_model and list_models: names, arguments, errors, and the configuration a network carries."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import repkern
from repkern.models import Network, default_block
from repkern.nn import OREPABlock, OREPADeepStem, RepVGGBlock
from repkern.nn.kinds import BLOCKS, KINDS, check_kind, make_block

NAMES = """
    repvgg_a0 repvgg_a1 repvgg_a2 repvgg_b0 repvgg_b1 repvgg_b1g2 repvgg_b1g4 repvgg_b2 repvgg_b2g2 repvgg_b2g4
    repvgg_b3 repvgg_b3g2 repvgg_b3g4 repvgg_d2se repopt_vgg_b1 repopt_vgg_b2 repopt_vgg_l1 repopt_vgg_l2
    repopt_vgg_b1_se repopt_vgg_b2_se repopt_vgg_l1_se repopt_vgg_l2_se resnet18 resnet34 resnet50 resnet101
    resnext50_32x4d wide_resnet18_1_5 wide_resnet18_2 vgg16_cifar mobilenet_v1 mobileone_s0 mobileone_s1 mobileone_s2
    mobileone_s3 mobileone_s4 repghostnet_050
"""


def small(name="resnet18", **options):
    return repkern.create_model(name, **{"width": 0.125, "num_classes": 3, **options})


def test_the_names():
    assert repkern.list_models() == sorted(NAMES.split())
    assert repkern.list_models("repvgg_b1*") == ["repvgg_b1", "repvgg_b1g2", "repvgg_b1g4"]
    assert repkern.list_models("nothing*") == []
    kinds = {name.partition("_")[0]: default_block(name) for name in repkern.list_models()}
    assert kinds["repvgg"] == "repvgg"
    assert kinds["repopt"] == kinds["resnet18"] == kinds["vgg16"] == kinds["mobilenet"] == "conv_bn"
    assert kinds["repghostnet"] == "repghost"


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("repvgg_a9", {}, ValueError, "no model 'repvgg_a9'; near it: repvgg_a"),
        ("zzz", {}, ValueError, r"no model 'zzz'; repkern\.list_models\(\) has all 37"),
        ("resnet18", {"block": "dbbb"}, ValueError, "block must be one of plain, conv_bn, .*got 'dbbb'"),
        ("resnet18", {"block": "repghost"}, ValueError, "block must be one of .*got 'repghost'"),
        ("resnet18", {"output_stride": 4}, ValueError, r"output_stride must be one of \(8, 16, 32\), got 4"),
        ("resnet18", {"out_indices": (0,)}, ValueError, "needs features_only=True"),
        ("resnet18", {"features_only": True, "out_indices": (5,)}, ValueError, r"0 to 4\), got \[5\]"),
        ("resnet18", {"features_only": True, "out_indices": (1, -4)}, ValueError, "distinct"),
        ("resnet18", {"features_only": True, "out_indices": ()}, ValueError, "some of the 5 feature maps"),
        ("resnet18", {"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
        ("resnet18", {"num_classes": 2.5}, TypeError, "num_classes must be an integer, got 2.5"),
        ("resnet18", {"in_chans": 0}, ValueError, "in_chans must be at least 1, got 0"),
        ("resnet18", {"width": 0}, ValueError, "width must be positive, got 0"),
        ("resnet18", {"recompute": "all"}, ValueError, "recompute must be one of none, cheap, got 'all'"),
        ("resnet18", {"dilated_layers": 5}, TypeError, "no option dilated_layers; it has none of its own"),
        ("repvgg_a0", {"dilated": 5}, TypeError, "no option dilated; it has dilated_layers"),
        ("repvgg_a0", {"dilated_layers": 99}, ValueError, "dilated_layers must be 0 to 22, got 99"),
        ("resnet18", {"block": "orepa", "block_options": {"scale": 1}}, TypeError, "no option scale; it has .*scaling"),
        ("resnet18", {"block_options": {"scaling": "vector"}}, TypeError, "'conv_bn' has no option scaling"),
        ("resnet18", {"block": "dbb", "block_options": {"border": nn.ReLU()}}, TypeError, "JSON values"),
    ],
)
def test_wrong_arguments(name, options, error, message):
    with pytest.raises(error, match=message):
        repkern.create_model(name, **options)


def test_inputs_are_checked():
    with pytest.raises(ValueError, match=r"resnet18: the input must be \[N, 1, H, W\], got \(2, 3, 32, 32\)"):
        small(in_chans=1)(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="resnet18: a features_only network has no head"):
        small(features_only=True).forward_head(torch.zeros(1, 64, 2, 2))


def test_the_config_makes_the_network_again():
    options = {
        "block": "orepa",
        "in_chans": 4,
        "features_only": True,
        "out_indices": (1, 2),
        "output_stride": 16,
        "block_options": {"scaling": "scalar", "factors": "plain"},
    }
    model = small("resnet50", **options)
    assert isinstance(model, Network)
    assert (model.model_name, model.block) == ("resnet50", "orepa")
    assert model.config == json.loads(json.dumps(model.config))
    again = repkern.create_model(**model.config)
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 4, 32, 32)
    for one, other in zip(model.eval()(x), again.eval()(x), strict=True):
        assert torch.equal(one, other)


def test_num_classes_0_gives_pooled_features():
    for name in ("resnet18", "repghostnet_050", "vgg16_cifar"):
        model = small(name, num_classes=0).eval()
        y = model(torch.randn(2, 3, 32, 32))
        assert y.shape == (2, model.num_features)
        assert not any(key.startswith("head") for key in model.state_dict())


def test_pre_logits():
    model = small().eval()
    features = model.forward_features(torch.randn(2, 3, 32, 32))
    hidden = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.head(hidden), model.forward_head(features))


def test_orepa_in_resnets_is_where_the_paper_has_it():
    model = small("resnet50", block="orepa")
    assert isinstance(model.stem, OREPADeepStem)
    first, second = model.stages[1][0], model.stages[1][1]
    for unit in (first, second):
        assert all(isinstance(conv, OREPABlock) for conv in (unit.conv1, unit.conv2, unit.conv3))
    assert isinstance(first.shortcut, OREPABlock)
    assert isinstance(second.shortcut, nn.Identity)
    basic = small("resnet18", block="orepa").stages[1][0]
    assert type(basic.shortcut).__name__ == "ConvNormAct"


def test_1x1_and_7x7_stay_plain_blocks_where_a_kind_has_no_form_for_them():
    model = small("resnet50", block="repvgg")
    assert type(model.stem).__name__ == type(model.stages[0][0].conv1).__name__ == "ConvNormAct"
    assert isinstance(model.stages[0][0].conv2, RepVGGBlock)


def test_initial_values_of_resnets_are_he_fan_out():
    model = repkern.create_model("resnet18", num_classes=10)
    conv = model.stages[3][1].conv2.conv
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    block = repkern.create_model("resnet18", block="dbb", num_classes=10).stages[3][1].conv2
    assert float(block.reduce.weight.detach().abs().max()) == 0  # the 1x1 of DBB starts as the identity
    bound = (1 / (512 * 9)) ** 0.5  # torch's own
    assert float(block.dense.weight.detach().abs().max()) <= bound


def test_checkpoint_is_loaded(tmp_path):
    model = small()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    again = small(checkpoint=str(tmp_path / "weights.pth"))
    assert "checkpoint" not in again.config
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_copies():
    model = small("repghostnet_050").eval()
    x = torch.randn(1, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(model(x), other(x))
        assert other.config == model.config


def test_kinds():
    assert set(KINDS) == {"plain", *BLOCKS}
    with pytest.raises(TypeError, match="has no option magic"):
        check_kind("orepa", {"magic": 1})
    for kind in KINDS:
        block = make_block(kind, 4, 4, 3, activation=nn.ReLU(), se=2, post_se=1).train()
        x = torch.randn(2, 4, 6, 5)
        block(x)
        block.eval()
        plain = repkern.reparameterize(block) if kind != "plain" else block
        wanted = make_block("plain", 4, 4, 3, activation=nn.ReLU(), se=2, post_se=1)
        assert [name for name, _ in plain.named_children()] == ["conv", "se", "activation", "post_se"], kind
        wanted.load_state_dict(plain.state_dict(), strict=True)
        torch.testing.assert_close(plain(x), block(x), rtol=1e-4, atol=1e-5)
