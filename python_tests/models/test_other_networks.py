"""replace_convs and reparameterize on networks of other libraries, rebuilt small with their names and their wiring."""

import copy
import functools
from collections import OrderedDict

import pytest
import torch
from torch import nn

import repkern
from repkern import OREPAConv2d, reparameterize, replace_convs
from repkern.nn import (
    ACBlock,
    ConvNormAct,
    CSLABlock,
    DiverseBranchBlock,
    DyRepBlock,
    MobileOneBlock,
    OREPABlock,
    OREPARepVGGBlock,
    QARepVGGBlock,
    ReplaceReport,
    RepVGGBlock,
)

# Guarded outputs are views, and these networks run activations in place, which autograd forbids on views.
pytestmark = pytest.mark.unguarded

# --- torchvision


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """relu is one module called in many places, and downsample an nn.Sequential or None."""

    def __init__(self, block, layers=(1, 2)):
        super().__init__()
        self.inplanes = 8
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(block, 8, layers[0], 1)
        self.layer2 = self._make_layer(block, 12, layers[1], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(12 * block.expansion, 5)

    def _make_layer(self, block, planes, blocks, stride):
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, planes * block.expansion, 1, stride, bias=False),
                nn.BatchNorm2d(planes * block.expansion),
            )
        layers = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * block.expansion
        return nn.Sequential(*layers, *(block(self.inplanes, planes) for _ in range(1, blocks)))

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Conv2dNormActivation(nn.Sequential):
    def __init__(self, inp, oup, kernel_size, stride=1, groups=1):
        conv = nn.Conv2d(inp, oup, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(oup), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    def __init__(self, inp, oup, stride, expand_ratio):
        super().__init__()
        hidden = inp * expand_ratio
        self.use_res_connect = stride == 1 and inp == oup
        layers = [Conv2dNormActivation(inp, hidden, 1)] if expand_ratio != 1 else []
        layers += [Conv2dNormActivation(hidden, hidden, 3, stride, groups=hidden)]
        layers += [nn.Conv2d(hidden, oup, 1, bias=False), nn.BatchNorm2d(oup)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [InvertedResidual(8, 4, 1, 1), InvertedResidual(4, 8, 2, 3), InvertedResidual(8, 8, 1, 3)]
        self.features = nn.Sequential(Conv2dNormActivation(3, 8, 3, 2), *blocks, Conv2dNormActivation(8, 16, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(16, 5))

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


# --- timm


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm whose forward also runs dropout and the activation, which are its children."""

    def __init__(self, channels, act_layer=nn.ReLU):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act_layer(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class TimmConvNormAct(nn.Module):
    def __init__(self, in_chs, out_chs, kernel_size, stride=1, groups=1, act_layer=nn.ReLU):
        super().__init__()
        padding = (stride - 1 + kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = BatchNormAct2d(out_chs, act_layer)
        self.aa = nn.Identity()

    def forward(self, x):
        return self.aa(self.bn(self.conv(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels, rd_channels):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, rd_channels, 1)
        self.act1 = nn.SiLU(inplace=True)
        self.conv_expand = nn.Conv2d(rd_channels, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


class TimmInvertedResidual(nn.Module):
    def __init__(self, in_chs, out_chs, dw_kernel_size, stride):
        super().__init__()
        mid = 2 * in_chs
        self.has_skip = in_chs == out_chs and stride == 1
        self.conv_pw = nn.Conv2d(in_chs, mid, 1, bias=False)
        self.bn1 = BatchNormAct2d(mid, nn.SiLU)
        self.conv_dw = nn.Conv2d(mid, mid, dw_kernel_size, stride, dw_kernel_size // 2, groups=mid, bias=False)
        self.bn2 = BatchNormAct2d(mid, nn.SiLU)
        self.se = SqueezeExcite(mid, 2)
        self.conv_pwl = nn.Conv2d(mid, out_chs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chs)

    def forward(self, x):
        y = self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))
        y = self.bn3(self.conv_pwl(self.se(y)))
        return y + x if self.has_skip else y


class EfficientNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.bn1 = BatchNormAct2d(6, nn.SiLU)
        self.blocks = nn.Sequential(
            nn.Sequential(TimmInvertedResidual(6, 6, 3, 1)), nn.Sequential(TimmInvertedResidual(6, 8, 5, 2))
        )
        self.conv_head = TimmConvNormAct(8, 12, 1, act_layer=nn.SiLU)
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(12, 5)))

    def forward(self, x):
        x = self.conv_head(self.blocks(self.bn1(self.conv_stem(x))))
        return self.head(x.mean((2, 3)))


NETWORKS = {
    "torchvision resnet18": functools.partial(ResNet, BasicBlock),
    "torchvision resnext50": functools.partial(ResNet, Bottleneck),
    "torchvision mobilenet_v2": MobileNetV2,
    "timm efficientnet": EfficientNet,
}
NORMED = (ConvNormAct, OREPABlock, RepVGGBlock, ACBlock, DiverseBranchBlock, DyRepBlock, CSLABlock, QARepVGGBlock,
          functools.partial(MobileOneBlock, num_conv_branches=2))  # fmt: skip


def name_of(block):
    return getattr(block, "func", block).__name__


def trained(model, steps=2):
    """After a few training steps in double precision, in eval mode."""
    model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images(4)), torch.tensor([0, 1, 2, 3]))
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
    return model.eval()


def images(batch=2):
    return torch.randn(batch, 3, 32, 40, dtype=torch.float64)


def assert_converts(model):
    assert any(isinstance(module, repkern.nn.RepBlock) for module in model.modules())
    x = images()
    with torch.no_grad():
        expected = model(x)
        plain = reparameterize(model, verify=x)
        assert not any(isinstance(module, repkern.nn.RepBlock) for module in plain.modules())
        assert float((plain(x) - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_orepa_in_place_of_every_convolution(name):
    model = NETWORKS[name]()
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    report = ReplaceReport()
    replace_convs(model, report=report)
    assert len(report.replaced) == convs
    assert not report.skipped
    assert_converts(trained(model))


@pytest.mark.parametrize("block", NORMED, ids=name_of)
@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_with_norms_take_over_a_trained_network(name, block):
    """preserve and fold_norm: the function of the pretrained network, then training, then the conversion."""
    model = trained(NETWORKS[name]())
    x = images()
    with torch.no_grad():
        before = model(x)
        report = ReplaceReport()
        replace_convs(model, block, preserve=True, fold_norm=True, report=report)
        after = model(x)
    assert float((after - before).abs().max()) <= 1e-9 * float(before.abs().max())
    if "timm" not in name:
        assert len(report.folded) == len(report.replaced)
    assert_converts(trained(model))


@pytest.mark.parametrize("name", NETWORKS)
def test_some_convolutions_only(name):
    model = NETWORKS[name]()
    before = copy.deepcopy(model)
    replace_convs(model, OREPARepVGGBlock, where=lambda path, conv: conv.kernel_size == (3, 3), fold_norm=True)
    for path, module in before.named_modules():
        if isinstance(module, nn.Conv2d):
            kind = OREPARepVGGBlock if module.kernel_size == (3, 3) else nn.Conv2d
            assert type(model.get_submodule(path)) is kind, path
    assert_converts(trained(model))


@pytest.mark.parametrize("wrapped", [False, True])
def test_norms_that_carry_the_activation_stay(wrapped):
    """timm's BatchNormAct2d is a BatchNorm2d, but not only that; the plain norm behind conv_pwl is folded as ever."""
    model = trained(nn.Sequential(nn.Conv2d(3, 5, 1), BatchNormAct2d(5), nn.Flatten()) if wrapped else EfficientNet())
    x = images()
    with torch.no_grad():
        before = model(x)
        report = ReplaceReport()
        replace_convs(model, OREPABlock, preserve=True, fold_norm=True, report=report)
        assert float((model(x) - before).abs().max()) <= 1e-9 * float(before.abs().max())
    kept = [module for module in model.modules() if isinstance(module, BatchNormAct2d)]
    assert len(kept) == (1 if wrapped else 6)
    folded = {} if wrapped else {f"blocks.{at}.0.conv_pwl": f"blocks.{at}.0.bn3" for at in (0, 1)}
    assert report.folded == folded
    if not wrapped:
        assert_converts(trained(model))


def test_what_is_a_block_already_stays():
    model = nn.Sequential(OREPAConv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    report = ReplaceReport()
    replace_convs(model, RepVGGBlock, fold_norm=True, report=report)
    assert report.replaced == ["3"]
