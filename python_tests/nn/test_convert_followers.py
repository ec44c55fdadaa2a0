"""fold_norm: a norm is taken over only where it is certain that nothing else reads the convolution."""

import logging

import pytest
import torch
from torch import nn

from repkern import replace_convs
from repkern.nn import OREPABlock, OREPARepVGGBlock, ReplaceReport
from repkern.search import HyperSearch
from repkern.testing import assert_close


def pair():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = pair()


class TapsByIndex(Base):
    """The order of calls is not that of the Sequential, and Python decides on values."""

    def forward(self, x):
        return (self.f[0](x), self.f(x)) if x.sum() < 1e9 else None


class TapsByName(Base):
    def forward(self, x):
        return (getattr(self.f, "0")(x), self.f(x)) if x.sum() < 1e9 else None


class TapsByLoop(Base):
    def forward(self, x):
        seen = []
        for part in self.f:
            x = part(x)
            seen.append(x)
        return tuple(seen) if seen[0].sum() < 1e9 else None


class TapsFromOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Base()

    def forward(self, x):
        return (self.inner.f[0](x), self.inner.f(x)) if x.sum() < 1e9 else None


class TapsInTraining(Base):
    """Traced in eval mode alone, the norm is the only reader."""

    def forward(self, x):
        return (self.f[0](x), self.f(x)) if self.training else self.f(x)


class TapsThroughAttribute(Base):
    def forward(self, x):
        self.kept = self.f[0](x)
        return self.f[2](self.f[1](self.kept))


class TapsIntoList(Base):
    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, x):
        self.kept.append(self.f[0](x))
        return self.f[2](self.f[1](self.kept[-1]))


class TapsTwice(Base):
    def forward(self, x):
        y = self.f[0](x)
        return y, self.f[1](y)


def tapped(model, x):
    output = model(x)
    if isinstance(output, torch.Tensor):
        return model.kept[-1] if isinstance(model.kept, list) else model.kept
    return output[0]


TAPS = [
    TapsByIndex,
    TapsByName,
    TapsByLoop,
    TapsFromOutside,
    TapsInTraining,
    TapsThroughAttribute,
    TapsIntoList,
    TapsTwice,
]


@pytest.mark.parametrize("kind", TAPS)
@pytest.mark.filterwarnings("ignore:replace_convs. nothing to replace")
def test_what_someone_else_reads_is_left_and_listed(kind):
    model = kind()
    x = torch.randn(2, 3, 6, 6)
    model.train(kind is TapsInTraining)
    before, state = tapped(model, x), dict(vars(model))
    report = ReplaceReport()
    replace_convs(model, OREPABlock, preserve=True, fold_norm=True, report=report)
    assert not report.folded
    ((name, reason),) = report.skipped.items()
    assert name.endswith("f.0")
    assert "f.1" in reason
    assert vars(model) == state
    assert_close(tapped(model, x), before, 1e-6, "the tapped map")


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("place", ["f.0", "f.1"])
@pytest.mark.filterwarnings("ignore:replace_convs. nothing to replace")
def test_hooks_count_as_readers(hook, place):
    class Net(Base):
        def forward(self, x):
            return self.f(x)

    model, report = Net().eval(), ReplaceReport()
    getattr(model.get_submodule(place), hook)(lambda module, args, output: None)
    replace_convs(model, OREPABlock, preserve=True, fold_norm=True, report=report)
    assert "hook" in report.skipped["f.0"]
    assert isinstance(model.f[1], nn.BatchNorm2d)


def test_a_hook_that_sees_the_input_does_not_read():
    model, report = nn.Sequential(pair()), ReplaceReport()
    model[0][0].register_forward_pre_hook(lambda module, args: None)
    replace_convs(model, OREPABlock, fold_norm=True, report=report)
    assert report.folded == {"0.0": "0.1"}


class Untraceable(nn.Module):
    """Calls each part as a whole, which its source shows."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(pair(), nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        for module in self.modules():
            module.own = True

    def forward(self, x):
        x = self.body(x)
        return self.bn(self.conv(x)) if x.sum() > 0 else x


class AuxiliaryHead(nn.Module):
    """One part runs in training only."""

    def __init__(self):
        super().__init__()
        self.body, self.head = pair(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        x = self.body(x)
        return (x, self.head(x)) if self.training else x


def test_parts_that_are_called_as_a_whole_are_folded():
    report = ReplaceReport()
    replace_convs(Untraceable(), OREPABlock, fold_norm=True, report=report)
    assert report.folded == {"body.0.0": "body.0.1", "body.1": "body.2"}
    report = ReplaceReport()
    replace_convs(AuxiliaryHead(), OREPABlock, fold_norm=True, report=report)
    assert report.folded == {"body.0": "body.1", "head.0": "head.1"}


def test_one_part_that_cannot_be_traced_does_not_hide_the_others(caplog):
    model, report = nn.Sequential(pair(), TapsByIndex(), nn.Identity()), ReplaceReport()
    model[1].f[0] = nn.Conv2d(4, 4, 3)
    with caplog.at_level(logging.INFO, logger="repkern"):
        replace_convs(model, OREPABlock, fold_norm=True, report=report)
    assert report.folded == {"0.0": "0.1"}
    assert "cannot be traced" in report.skipped["1.f.0"]
    assert "tracing failed in TapsByIndex" in caplog.text


def test_a_part_with_a_module_that_sits_elsewhere_too_is_not_known_to_be_called_as_a_whole():
    model, report = nn.Sequential(Untraceable()), ReplaceReport()
    model.append(model[0].body[0][0])
    replace_convs(model, OREPABlock, fold_norm=True, report=report)
    assert not report.folded
    assert set(report.skipped) == {"0.body.0.0", "0.body.1"}


def test_a_norm_without_running_statistics_is_skipped_by_name():
    for kind in (OREPABlock, OREPARepVGGBlock):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 3))
        report = ReplaceReport()
        replace_convs(model, kind, preserve=True, fold_norm=True, report=report)
        assert "track_running_stats=False" in report.skipped["0"]
        assert report.replaced == ["2"]


def test_a_search_takes_layers_whose_output_others_read():
    """It changes neither the convolution's output nor the norm."""
    assert HyperSearch(TapsTwice()).layers == ("f.0",)
