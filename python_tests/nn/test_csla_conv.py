"""CSLAConv2d: nn.Conv2d's place taken by scaled branches without a norm."""

import torch
from torch import nn
from torch.nn import functional

from repkern import replace_convs
from repkern.nn import CSLAConv2d


def test_it_is_the_sum_of_its_branches(same):
    torch.manual_seed(0)
    conv = CSLAConv2d(4, 4, 3, padding=1, groups=2, train_scales="all", dtype=torch.float64)
    with torch.no_grad():
        for scale in (conv.dense_scale, conv.pointwise_scale, conv.identity_scale):
            scale.weight.normal_()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = conv.dense_scale.weight[:, None, None] * functional.conv2d(x, conv.dense.weight, padding=1, groups=2)
    expected = expected + conv.pointwise_scale.weight[:, None, None] * functional.conv2d(
        x, conv.pointwise.weight, groups=2
    )
    expected = expected + conv.identity_scale.weight[:, None, None] * x + conv.bias[:, None, None]
    same(conv(x), expected, 1e-13)
    same(conv(x[0]), expected[0], 1e-13)
    same(conv.fuse()(x), expected, 1e-13)


def test_arguments_are_those_of_the_convolution():
    plain = nn.Conv2d(3, 6, 5, 2, (2, 1), 1, 3, bias=False, padding_mode="reflect")
    conv = replace_convs(plain, CSLAConv2d)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "padding_mode"):
        assert getattr(conv, name) == getattr(plain, name), name
    assert conv.bias is None
    assert not hasattr(conv, "bn")
    assert conv.identity_scale is None
    biased = replace_convs(nn.Conv2d(3, 6, 3), CSLAConv2d)
    assert biased.bias.abs().max() <= 27**-0.5
    assert [name for name, p in biased.named_parameters() if not p.requires_grad] == [
        "dense_scale.weight",
        "pointwise_scale.weight",
    ]
