"""What replace_convs says about layers that it does not take, and about code that reads a convolution's weight."""

import torch
from torch import nn
from torch.nn import functional

from repkern import replace_convs
from repkern.nn import OREPABlock, ReplaceReport


class Standardized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Sequential(nn.Conv2d(3, 3, 3))
        self.initialized = nn.Conv2d(3, 3, 3)
        nn.init.normal_(self.initialized.weight)

    def forward(self, x):
        weight = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
        x = functional.conv2d(x, weight, self.conv.bias, padding=1)
        return x + self.other[0].bias[:, None, None]


class Adaptive(nn.Module):
    """A convolution of a class of its own."""

    def __init__(self):
        super().__init__()
        self.kernel_size, self.weight = (3, 3), nn.Parameter(torch.randn(3, 3, 3, 3))


def test_layers_that_look_like_candidates_are_listed_with_their_class():
    net = nn.Sequential(
        nn.Conv2d(3, 3, 3),
        nn.ConvTranspose2d(3, 3, 3),
        nn.Conv1d(3, 3, 3),
        nn.Conv3d(3, 3, 3),
        nn.LazyConvTranspose2d(3, 3),
        nn.LazyConv2d(3, 3),
        Adaptive(),
        nn.MaxPool2d(2),
        nn.Linear(2, 2),
        OREPABlock(3, 3, 3),
    )
    report = ReplaceReport()
    replace_convs(net, report=report)
    assert list(report.lookalikes) == ["1", "2", "3", "4", "6"]
    assert report.lookalikes["1"].startswith("ConvTranspose2d")
    assert report.lookalikes["4"].startswith("LazyConvTranspose2d")
    assert "not initialized" in report.skipped["5"]
    assert "not taken 2: Conv1d is not an nn.Conv2d" in str(report)


def test_parents_that_read_a_weight_are_listed():
    report = ReplaceReport()
    replace_convs(nn.Sequential(Standardized()), report=report)
    assert report.weight_readers == {
        "0.conv": "Standardized reads its weight",
        "0.other.0": "Standardized reads its bias",
    }
    assert "look at 0.conv: Standardized reads its weight" in str(report)


def test_a_class_without_source_is_no_obstacle():
    space = {"nn": nn}
    exec(
        "class Made(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 3, 3)\n"
        "    def forward(self, x):\n"
        "        return self.conv.weight\n",
        space,
    )
    report = ReplaceReport()
    replace_convs(space["Made"](), report=report)
    assert report.replaced == ["conv"]
    assert report.weight_readers == {}
