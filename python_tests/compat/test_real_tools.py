"""The tools of torchvision, timm and segmentation_models_pytorch themselves, on networks with our blocks."""

import copy
import warnings

import pytest
import torch
from compat_matrix.networks import FAMILIES, images, of_timm, with_statistics
from compat_matrix.values import close
from torch import nn

from repkern import reparameterize, replace_convs
from repkern.nn import CSLAConv2d, DiracConv2d, OREPAConv2d, OREPARepVGGBlock, RepBlock, TrivialRepConv2d

KERNEL_CONVS = (OREPAConv2d, CSLAConv2d, DiracConv2d, TrivialRepConv2d)
EQUAL = 1e-8
# Outputs between guard bytes are views, which activations of these networks could not write to in place.
pytestmark = pytest.mark.unguarded


def small(name, conv):
    return conv.kernel_size[0] > 1


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("block", KERNEL_CONVS, ids=lambda block: block.__name__)
@pytest.mark.parametrize("whole", [True, False], ids=["all", "spatial"])
def test_timm_reparameterizes(name, block, whole):
    utils = pytest.importorskip("timm.utils")
    model, x = of_timm(name).make(), images()
    replaced = replace_convs(copy.deepcopy(model), block, where=None if whole else small, preserve=True)
    close(replaced(x), model(x), "the preserved function", EQUAL)
    torch.set_default_dtype(torch.float64)  # repvit makes its fused layers in the default one
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            deployed = utils.reparameterize_model(replaced)
    finally:
        torch.set_default_dtype(torch.float32)
    close(deployed(x), model(x), "reparameterized by timm", EQUAL)
    close(reparameterize(deployed)(x), model(x), "by timm and by us", EQUAL)
    close(reparameterize(replaced)(x), model(x), "by us", EQUAL)


@pytest.mark.parametrize("block", [OREPAConv2d, OREPARepVGGBlock], ids=lambda block: block.__name__)
def test_timm_reparameterizes_roots(block):
    utils = pytest.importorskip("timm.utils")
    model = block(3, 4, 3, padding=1).double()
    with_statistics(model)
    same = utils.reparameterize_model(model)  # looks at children only: a root stays in its training form
    close(same(images()), model(images()), "a root", EQUAL)
    deployed = reparameterize(same)
    assert not any(isinstance(module, RepBlock) for module in deployed.modules())
    close(deployed(images()), model(images()), "a root, by us", EQUAL)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "rmsproptf"])
def test_timm_optimizers(name):
    optim = pytest.importorskip("timm.optim")
    model, x = replace_convs(of_timm("resnet18d").make(), OREPAConv2d, preserve=True), images()
    optimizer = optim.create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.05)
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    before = model(x)
    model.train()(x).square().mean().backward()
    optimizer.step()
    after = model.eval()(x)
    assert not torch.equal(after, before)
    close(reparameterize(model)(x), after, "deployed", EQUAL)


def test_timm_weight_decay():
    optim = pytest.importorskip("timm.optim")
    model = replace_convs(of_timm("repvit_m0_9").make(), OREPAConv2d)
    spared, decayed = optim.param_groups_weight_decay(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    kept = [names[id(p)] for p in decayed["params"]]
    assert not [name for name in kept if name.endswith((".scale.weight", ".bias", "bn.weight"))]
    assert any(name.endswith(".scale.weight") for name in (names[id(p)] for p in spared["params"]))
    assert any(name.endswith(".origin.weight") for name in kept)


@pytest.mark.parametrize("name", ["resnet18d", "mobilenetv4_conv_small", "repvgg_a0"])
def test_timm_features_only(name):
    pytest.importorskip("timm")
    model, x = of_timm(name, features_only=True, num_classes=0).construct().double(), images()
    model = with_features(model)
    wanted = model(x)
    replaced = replace_convs(copy.deepcopy(model), OREPAConv2d, preserve=True)
    for features in (replaced(x), reparameterize(replaced)(x)):
        assert len(features) == len(wanted)
        for at, (got, expected) in enumerate(zip(features, wanted, strict=True)):
            close(got, expected, f"feature map {at}", EQUAL)


def with_features(model):
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64, dtype=torch.float64))
    return model.eval()


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer2.0.conv1"), ("mobilenet_v2", "features.3.conv.1"),
                                             ("regnet_y_400mf", "trunk_output.block2")])  # fmt: skip
def test_torchvision_feature_extractor(name, layer):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    import torchvision

    model, x = torchvision.models.get_model(name, weights=None).double(), images()
    replaced = replace_convs(with_statistics(model), OREPAConv2d).eval()
    seen = []
    handle = replaced.get_submodule(layer).register_forward_hook(lambda _, args, out: seen.append(out))
    logits = replaced(x)
    handle.remove()
    extractor = extraction.create_feature_extractor(copy.deepcopy(replaced), {layer: "feature"}).eval()
    close(extractor(x)["feature"], seen[0], "feature", EQUAL)
    extractor(x)["feature"].square().mean().backward()
    assert all(p.grad is not None for p in extractor.parameters() if p.requires_grad)
    # A deep copy of torchvision's extractor is in train mode, so it is converted as it stands.
    deployed = reparameterize(extractor, inplace=True)
    close(deployed(x)["feature"], seen[0], "feature, deployed", EQUAL)
    close(reparameterize(replaced)(x), logits, "deployed", EQUAL)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_torchvision_frozen_norms(name):
    misc = pytest.importorskip("torchvision.ops.misc")
    import torchvision

    model, x = with_statistics(torchvision.models.get_model(name, weights=None).double()), images()
    replaced = replace_convs(copy.deepcopy(model), OREPAConv2d, preserve=True)
    for module in list(replaced.modules()):
        for child, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                frozen = misc.FrozenBatchNorm2d(norm.num_features, norm.eps).double()
                frozen.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"})
                setattr(module, child, frozen)
    close(replaced(x), model(x), "frozen", EQUAL)
    close(reparameterize(replaced)(x), model(x), "frozen, deployed", EQUAL)


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("encoder", ["resnet18", "resnet50", "mobilenet_v2", "resnext50_32x4d", "vgg11_bn"])
def test_smp_encoders_made_dilated(encoder, stride):
    smp = pytest.importorskip("segmentation_models_pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = smp.encoders.get_encoder(encoder, weights=None).double()
    model, x = with_features(model), images()
    replaced = replace_convs(copy.deepcopy(model), OREPAConv2d, preserve=True)
    if "vgg" in encoder:
        with pytest.raises(ValueError, match="dilated"):  # its own refusal
            replaced.make_dilated(output_stride=stride)
        return
    for made in (model, replaced):
        made.make_dilated(output_stride=stride)
    deployed = reparameterize(replaced)
    for at, (wanted, got, plain) in enumerate(zip(model(x), replaced(x), deployed(x), strict=True)):
        close(got, wanted, f"feature map {at}", EQUAL)
        close(plain, wanted, f"feature map {at}, deployed", EQUAL)


@pytest.mark.parametrize("encoder", ["resnet18", "resnet34"])
def test_smp_blocks_with_norms_made_dilated(encoder):
    """Every inner convolution of multi-branch blocks is dilated by the same walk."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    from segmentation_models_pytorch.encoders._utils import replace_strides_with_dilation

    model, x = with_features(smp.encoders.get_encoder(encoder, weights=None).double()), images()
    replaced = copy.deepcopy(model)
    replace_convs(replaced.layer4, OREPARepVGGBlock, where=small, preserve=True, fold_norm=True)
    for made in (model, replaced):
        replace_strides_with_dilation(made.layer4, 2)
    close(replaced(x)[-1], model(x)[-1], "dilated", EQUAL)
    with_features(replaced)  # statistics of the new norms
    close(reparameterize(replaced)(x)[-1], replaced(x)[-1], "dilated, deployed", EQUAL)
