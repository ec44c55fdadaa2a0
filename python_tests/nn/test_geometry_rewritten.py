"""Stride, padding, dilation and padding mode that are written after construction: both forms follow, or both refuse."""

import copy

import pytest
import torch
from torch import nn

import repkern
from repkern.nn import (
    ACBlock,
    ConvNormAct,
    CSLABlock,
    CSLAConv2d,
    DiracConv2d,
    DiverseBranchBlock,
    DyRepBlock,
    MobileOneBlock,
    ODBBlock,
    OREPABlock,
    OREPAConv2d,
    OREPADeepStem,
    OREPARepVGGBlock,
    QARepVGGBlock,
    RepBlock,
    RepVGGBlock,
    TrivialRepConv2d,
)

BRANCHED = (
    ACBlock, ConvNormAct, CSLABlock, DiverseBranchBlock, DyRepBlock, MobileOneBlock, ODBBlock, OREPABlock,
    OREPARepVGGBlock, QARepVGGBlock, RepVGGBlock,
)  # fmt: skip
CONVOLUTIONS = (CSLAConv2d, DiracConv2d, OREPAConv2d, TrivialRepConv2d)


def made(kind, ci=4, co=6, k=3, **options):
    options = {"padding": k // 2, "dtype": torch.float64} | options
    block = kind(ci, co, k, **options)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return block.eval()


def is_alike(block, like):
    """Same parameters, another way to the geometry: one function, fused or not."""
    like.load_state_dict(block.state_dict())
    x = torch.randn(2, block.in_channels, 13, 15, dtype=torch.float64)
    wanted = like(x)
    for output in (block(x), block.fuse()(x), copy.deepcopy(block)(x)):
        assert output.shape == wanted.shape
        assert torch.allclose(output, wanted, rtol=0, atol=1e-11 * wanted.abs().max().item())


def dilate_all(module, rate):
    """As encoders are dilated: every convolution, by isinstance."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            conv.stride = (1, 1)
            conv.dilation = (rate, rate)
            height, width = conv.kernel_size
            conv.padding = ((height // 2) * rate, (width // 2) * rate)


@pytest.mark.parametrize("kind", [*BRANCHED, *CONVOLUTIONS])
@pytest.mark.parametrize("k", [3, 5])
def test_every_convolution_inside_dilated_alike(kind, k):
    torch.manual_seed(0)
    for co, stride in ((6, 2), (4, 1)):
        block = made(kind, 4, co, k, stride=stride)
        dilate_all(block, 2)
        is_alike(block, made(kind, 4, co, k, dilation=2, padding=k // 2 * 2) if stride == 1 else _without(kind, co, k))


def _without(kind, co, k):
    """At stride 1; there is no identity branch, for which 4 and 6 channels are too different."""
    return made(kind, 4, co, k, dilation=2, padding=k // 2 * 2)


@pytest.mark.parametrize("kind", [*BRANCHED, *CONVOLUTIONS, OREPADeepStem])
@pytest.mark.parametrize(
    "written",
    [
        {"stride": 2},
        {"padding": (0, 3)},
        {"dilation": 3, "padding": 2},
        {"padding_mode": "reflect"},
        {"padding_mode": "circular", "padding": 2, "stride": (2, 1)},
        {"padding": "valid"},
    ],
)
def test_the_blocks_own_attribute(kind, written):
    torch.manual_seed(0)
    k = 5 if kind is OREPADeepStem else 3
    block = made(kind, k=k)
    for name, value in written.items():
        setattr(block, name, value)
    is_alike(block, made(kind, k=k, **written))


# Where `dense` alone has a padding or a dilation, the block follows it.
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *(
            (kind, "stride")
            for kind in (ACBlock, CSLABlock, DiverseBranchBlock, DyRepBlock, MobileOneBlock, RepVGGBlock)
        ),
        *((kind, "dilation") for kind in (ACBlock, DiverseBranchBlock, DyRepBlock, MobileOneBlock)),
        *((kind, "padding") for kind in (ACBlock, DyRepBlock, MobileOneBlock)),
    ],
)
def test_one_convolution_alone_is_refused(kind, field):
    options = {"num_conv_branches": 2} if kind is MobileOneBlock else {}
    block = made(kind, **options)
    dense = block.dense[1] if kind is MobileOneBlock else block.dense
    setattr(dense, field, (3, 3))
    for use in (lambda: block(torch.randn(1, 4, 9, 9, dtype=torch.float64)), block.fuse, block.equivalent_kernel_bias):
        with pytest.raises(ValueError, match=rf"{kind.__name__}.*do not agree.*dense.*{field}=\(3, 3\)"):
            use()


@pytest.mark.parametrize("kind", [RepVGGBlock, CSLABlock, QARepVGGBlock, ODBBlock, MobileOneBlock, DyRepBlock])
def test_an_identity_branch_needs_its_pixels(kind):
    block = made(kind, 4, 4)
    block.stride = 2
    with pytest.raises(ValueError, match=r"adds its input.*stride=\(2, 2\)"):
        block(torch.randn(1, 4, 9, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match="adds its input"):
        block.fuse()
    block.stride = 1
    is_alike(block, made(kind, 4, 4))
    block.dilation = 2  # not yet: the padding follows
    block.padding = 2
    is_alike(block, made(kind, 4, 4, dilation=2, padding=2))


def test_nested_blocks_follow():
    torch.manual_seed(0)

    def nested(**options):
        block = made(DyRepBlock, **options)
        block.dense = DyRepBlock.grow(block.dense)
        block.expand = DyRepBlock.grow(block.expand)
        return block.eval()

    for dilate in (lambda block: dilate_all(block, 2), lambda block: block.__setattr__("dilation", 2)):
        block = nested()
        dilate(block)
        block.padding = 2
        like = nested(dilation=2, padding=2)
        is_alike(block, like)


@pytest.mark.parametrize("before", [{}, {"stride": 2}, {"stride": (2, 1), "padding": (1, 4)}])
def test_a_stem_of_dilated_factors(before):
    torch.manual_seed(0)
    block = made(OREPADeepStem, k=7, **before)
    dilate_all(block, 2)
    is_alike(block, made(OREPADeepStem, k=7, dilation=2, padding=6))


@pytest.mark.parametrize("kind", [*BRANCHED, *CONVOLUTIONS, OREPADeepStem])
def test_a_fresh_block_has_the_geometry_it_was_given(kind):
    k = 5 if kind is OREPADeepStem else 3
    given = {"stride": (2, 1), "padding": (1, 4), "dilation": (2, 3), "padding_mode": "circular"}
    block = made(kind, k=k, **given)
    fused = block.fuse()
    for name, value in given.items():
        assert getattr(block, name) == value, name
        assert getattr(fused, name) == value, name


@pytest.mark.parametrize(
    ("name", "value"), [("in_channels", 3), ("out_channels", 7), ("kernel_size", (5, 5)), ("groups", 2)]
)
def test_what_the_parameters_are_made_for_cannot_change(name, value):
    block = made(RepVGGBlock)
    before = getattr(block, name)
    with pytest.raises(ValueError, match=rf"{name} of a RepVGGBlock is .* and cannot become"):
        setattr(block, name, value)
    assert getattr(block, name) == before
    setattr(block, name, before)


def test_values_that_are_no_geometry_are_refused_and_nothing_changes():
    block = made(OREPAConv2d)
    for name, value in (
        ("stride", 0),
        ("padding", -1),
        ("dilation", 1.5),
        ("padding_mode", "mirror"),
        ("stride", 2**40),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            setattr(block, name, value)
    assert (block.stride, block.padding, block.dilation, block.padding_mode) == ((1, 1), (1, 1), (1, 1), "zeros")


def test_in_a_network_dilated_at_the_end():
    """The recipe of segmentation encoders, on blocks that already train."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()).double()
    branched = repkern.replace_convs(copy.deepcopy(net), preserve=True)
    dilate_all(net[2:], 2)
    dilate_all(branched[2:], 2)
    assert isinstance(branched[2], RepBlock)
    x = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    assert torch.allclose(net(x), branched(x), atol=1e-12)
    assert torch.allclose(net(x), repkern.reparameterize(branched.eval(), verify=x)(x), atol=1e-12)
