"""Parameter counts and multiply-adds of every row of the papers' tables, computed from our networks."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import repkern
from repkern.nn import DiverseBranchBlock

MILLION, BILLION = 1e6, 1e9
ON_MAPS = (torch.ops.aten.convolution, torch.ops.aten.addmm)

# Training form and deployed form in millions, counted on the released code (RepVGG, paper 2101.03697).
REPVGG = {
    "repvgg_a0": ("9.11", "8.31"),
    "repvgg_a1": ("14.09", "12.79"),
    "repvgg_a2": ("28.21", "25.50"),
    "repvgg_b0": ("15.82", "14.34"),
    "repvgg_b1": ("57.42", "51.83"),
    "repvgg_b1g2": ("45.78", "41.36"),
    "repvgg_b1g4": ("39.97", "36.13"),
    "repvgg_b2": ("89.02", "80.32"),
    "repvgg_b2g2": ("70.85", "63.96"),
    "repvgg_b2g4": ("61.76", "55.78"),
    "repvgg_b3": ("123.09", "110.96"),
    "repvgg_b3g2": ("96.91", "87.40"),
    "repvgg_b3g4": ("83.83", "75.63"),
    "repvgg_d2se": ("133.33", "120.39"),
}

# (model, block, parameters in millions, multiply-adds in billions at 224 x 224, or 32 x 32 on CIFAR)
RAN = [  # RepVGG, Tables 4 and 5: deployed
    ("repvgg_a0", "plain", "8.30", "1.4"),
    ("repvgg_a1", "plain", "12.78", "2.4"),
    ("repvgg_a2", "plain", "25.49", "5.1"),
    ("repvgg_b0", "plain", "14.33", "3.1"),
    ("repvgg_b1", "plain", "51.82", "11.8"),
    ("repvgg_b1g2", "plain", "41.36", "8.8"),
    ("repvgg_b1g4", "plain", "36.12", "7.3"),
    ("repvgg_b2", "plain", "80.31", "18.4"),
    ("repvgg_b2g4", "plain", "55.77", "11.3"),
    ("repvgg_b3", "plain", "110.96", "26.2"),
    ("repvgg_b3g4", "plain", "75.62", "16.1"),
    ("resnet18", "plain", "11.68", "1.8"),
    ("resnet34", "plain", "21.78", "3.7"),
    ("resnext50_32x4d", "plain", "24.99", "4.2"),
    # DyRep (paper 2203.12868), Tables 2 and 3
    ("vgg16_cifar", "conv_bn", "15.0", "0.313"),
    ("mobilenet_v1", "conv_bn", "4.2", "0.57"),
    ("resnet18", "conv_bn", "11.7", "1.81"),
    ("resnet34", "conv_bn", "21.8", "3.66"),
    ("resnet50", "conv_bn", "25.6", "4.09"),
    # RepOptimizers (paper 2205.15242), Table 1, and Table 2's training form of its baseline
    ("repopt_vgg_b2", "plain", "80.3", "18.4"),
    ("repopt_vgg_l1", "plain", "76.0", "21.0"),
    ("repopt_vgg_l2", "plain", "118.1", "32.8"),
    ("repopt_vgg_b1", "repvgg", "57.4", None),
    ("repopt_vgg_b2", "repvgg", "89.0", None),
    ("repopt_vgg_l1", "repvgg", "84.3", None),
    ("repopt_vgg_l2", "repvgg", "131.0", None),
    # MobileOne (paper 2206.04040)
    ("mobileone_s0", "plain", "2.1", "0.275"),
    ("mobileone_s1", "plain", "4.8", "0.825"),
    ("mobileone_s2", "plain", "7.8", None),
    ("mobileone_s3", "plain", "10.1", "1.896"),
    ("mobileone_s4", "plain", "14.8", None),
    # RepGhost (paper 2211.06088)
    ("repghostnet_050", "plain", "2.3", "0.043"),
]

# DyRep, Table 3: DBB in training form. The pooling of its average branch is not counted there; here it runs as a
# depthwise convolution, K^2 multiply-adds an output value.
DBB = [("resnet18", "26.3", "4.13"), ("resnet34", "49.9", "8.44"), ("resnet50", "40.7", "6.79")]

# Width multipliers are named in the OREPA paper (supplement, Table 2) without counts: ours, so that they do not change.
OWN = {"wide_resnet18_1_5": 25_901_896, "wide_resnet18_2": 45_693_032}


@functools.cache
def network(name, block):
    cifar = "cifar" in name
    with torch.device("meta"):
        return repkern.create_model(name, block=block, num_classes=10 if cifar else 1000).eval()


def parameters(name, block):
    return sum(parameter.numel() for parameter in network(name, block).parameters())


def multiply_adds(name, block):
    """Multiply-adds of convolutions and linear layers for one image; torch counts two operations for each.

    Products of kernels, such as the constant that a folded inner norm sends through the next kernel, are not per image.
    """
    size = 32 if "cifar" in name else 224
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        network(name, block)(torch.empty(1, 3, size, size))
    return sum(counter.get_flop_counts()["Global"].get(op, 0) for op in ON_MAPS) / 2


def assert_shown(value, printed):
    """The printed digits are the value's, rounded or cut off (tables do both)."""
    unit = 10.0 ** -len(printed.partition(".")[2])
    assert float(printed) - 0.5 * unit - 1e-9 <= value < float(printed) + unit, f"{value:.4f} is not {printed}"


@pytest.mark.parametrize("name", REPVGG)
def test_repvgg_parameters(name):
    training, deployed = REPVGG[name]
    assert_shown(parameters(name, "repvgg") / MILLION, training)
    assert_shown(parameters(name, "plain") / MILLION, deployed)


@pytest.mark.parametrize(("name", "block", "millions", "billions"), RAN)
def test_rows_of_the_tables(name, block, millions, billions):
    assert_shown(parameters(name, block) / MILLION, millions)
    if billions is not None:
        assert_shown(multiply_adds(name, block) / BILLION, billions)


@pytest.mark.parametrize(("name", "millions", "billions"), DBB)
def test_dbb_rows(name, millions, billions):
    averages = []
    model = network(name, "dbb")
    handles = [
        block.register_forward_hook(lambda block, args, output: averages.append(9 * output.numel()))
        for block in model.modules()
        if isinstance(block, DiverseBranchBlock)
    ]
    counted = multiply_adds(name, "dbb")
    for handle in handles:
        handle.remove()
    assert_shown(parameters(name, "dbb") / MILLION, millions)
    assert_shown((counted - sum(averages)) / BILLION, billions)


@pytest.mark.parametrize(
    ("name", "millions", "billions"), [("resnet50", "25.53", "3.9"), ("resnet101", "44.49", "7.6")]
)
def test_repvgg_paper_strides_the_first_layer_of_bottlenecks(name, millions, billions):
    """Table 4 has He et al.'s networks; DBB, DyRep (4.09) and OREPA stride the 3x3, so conv1 sees 4 times as much."""
    model = network(name, "plain")
    more = []
    for stage, size in ((1, 56), (2, 28), (3, 14)):
        conv = model.stages[stage][0].conv1.conv
        more.append(0.75 * conv.weight.numel() * size**2)
    assert_shown(parameters(name, "plain") / MILLION, millions)
    assert_shown((multiply_adds(name, "plain") - sum(more)) / BILLION, billions)


@pytest.mark.parametrize(
    ("name", "block", "millions", "billions", "off"),
    [
        # RepOptimizers' Table 1 says 11.9; the RepVGG paper says 11.8 of the same network.
        ("repopt_vgg_b1", "plain", 51.8, 11.9, 0.01),
        # MobileOne counts 1299 and 2978 million; ours are 1298.4 and 2979.3, squeeze-excite included.
        ("mobileone_s2", "plain", 7.81, 1.299, 0.001),
        ("mobileone_s4", "plain", 14.84, 2.978, 0.001),
        # DyRep's Table 2 does not say what its DBB counts: 34.7 and 0.728, ours are 34.56 and 0.732.
        ("vgg16_cifar", "dbb", 34.7, 0.728, 0.01),
        # DyRep's DBB keeps Ci internal channels in depthwise layers, DBB's release and ours have 2 Ci there.
        ("mobilenet_v1", "dbb", 4.3, 0.61, 0.07),
    ],
)
def test_where_the_tables_and_we_differ(name, block, millions, billions, off):
    assert parameters(name, block) / MILLION == pytest.approx(millions, rel=off)
    assert multiply_adds(name, block) / BILLION == pytest.approx(billions, rel=off)


@pytest.mark.parametrize("name", OWN)
def test_counts_without_a_table(name):
    assert parameters(name, "conv_bn") == OWN[name]


def test_orepa_trains_one_convolution_a_layer():
    """The claim of paper 2204.00826: however many branches, feature maps see the deployed network's convolutions."""
    for name in ("resnet18", "resnet50", "resnext50_32x4d"):
        assert parameters(name, "orepa") > 2 * parameters(name, "plain")
        assert multiply_adds(name, "orepa") == multiply_adds(name, "plain")
