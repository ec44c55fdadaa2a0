"""replace_convs on whole models: sharing, hooks, flags, what is left alone and what is reported."""

import copy
import functools
import logging

import pytest
import torch
from torch import nn

from repkern import OREPAConv2d, reparameterize, replace_convs
from repkern.nn import OREPABlock, OREPADeepStem, OREPARepVGGBlock, RepGhostModule, ReplaceReport
from repkern.testing import assert_close

ELIGIBLE = ["stem", "body.0.conv1", "body.0.conv2", "body.1.0.conv1", "body.1.0.conv2", "depthwise", "head"]


def largest(tensor):
    return float(tensor.detach().abs().max())


def test_every_eligible_convolution_is_replaced_in_place_and_reported(net, x, caplog):
    model, report = net(), ReplaceReport()
    with caplog.at_level(logging.INFO, logger="repkern"):
        assert replace_convs(model, report=report) is model
    assert report.replaced == ELIGIBLE
    assert report.skipped == {"even": "kernel 2x2 is even"}
    assert "even: kernel 2x2 is even" in caplog.text
    assert isinstance(model.even, nn.Conv2d)
    assert all(isinstance(model.get_submodule(name), OREPAConv2d) for name in ELIGIBLE)
    assert model.again is model.body[0]
    model(x).sum().backward()


def test_where_picks(net):
    report = ReplaceReport()
    replace_convs(model := net(), where=lambda name, conv: conv.kernel_size == (1, 1), report=report)
    assert report.replaced == ["head"]
    assert report.skipped["stem"] == "not picked by `where`"
    assert isinstance(model.stem, nn.Conv2d)


@pytest.mark.parametrize("kind", [OREPAConv2d, OREPABlock, OREPARepVGGBlock])
def test_preserve_starts_as_the_old_function(net, trained, kind):
    model = trained(net().double())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    replace_convs(model, kind, preserve=True, where=lambda name, conv: name != "head")
    assert isinstance(model.stem, kind)
    assert_close(model(x), expected, 1e-12 * largest(expected), "after replacing")


def test_preserve_gives_the_old_kernel_within_rounding():
    conv = nn.Conv2d(16, 24, 3)
    new = replace_convs(copy.deepcopy(conv), preserve=True)
    weight, bias = new.equivalent_kernel_bias()
    # One rounding of origin, then the squeeze's: in units of the branches' size, which is what cancels.
    unit = torch.finfo(torch.float32).eps
    assert_close(weight, conv.weight, 64 * unit * largest(new.origin.weight), "kernel")
    assert torch.equal(bias, conv.bias)


@pytest.mark.parametrize("kind", [OREPABlock, OREPARepVGGBlock])
def test_fold_norm_takes_the_following_norm_over(net, trained, kind):
    model = trained(net().double())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected, norm, report = model(x), model.norm, ReplaceReport()
    replace_convs(model, kind, preserve=True, fold_norm=True, report=report, where=lambda n, c: n != "head")
    assert report.folded == {
        "stem": "norm",
        "body.1.0.conv1": "body.1.0.bn1",
        "body.1.0.conv2": "body.1.0.bn2",
    }  # body.0 runs twice, so its norms are not one convolution's
    assert isinstance(model.norm, nn.Identity)
    assert (kind is OREPABlock) == (getattr(model.stem, "bn", None) is norm)
    assert_close(model(x), expected, 1e-12 * largest(expected), "after folding")


def test_fold_norm_with_preserve_keeps_the_training_function_of_an_adopted_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    other = replace_convs(copy.deepcopy(model), OREPABlock, preserve=True, fold_norm=True)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    expected = model(x)
    assert_close(other(x), expected, 1e-12 * largest(expected), "train output")
    model.eval(), other.eval()
    assert_close(other(x), model(x), 1e-12 * largest(model(x)), "eval output after one step")


def test_fold_norm_without_a_trace_uses_sequential_neighbours(caplog):
    class Branching(nn.Sequential):
        pass

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Branching(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(self.body(x))) if x.sum() > 0 else self.body(x)

    report = ReplaceReport()
    with caplog.at_level(logging.INFO, logger="repkern"):
        replace_convs(Untraceable(), OREPABlock, fold_norm=True, report=report)
    assert report.folded == {"body.0": "body.1"}
    assert "tracing failed" in caplog.text


def test_fold_norm_needs_a_block_with_a_norm(net):
    with pytest.raises(ValueError, match="OREPAConv2d has none"):
        replace_convs(net(), fold_norm=True)


def test_preserve_with_a_block_that_cannot(net):
    with pytest.raises(ValueError, match="OREPADeepStem cannot start as a given convolution"):
        replace_convs(net(), OREPADeepStem, preserve=True)


def test_a_block_that_does_not_fit_a_convolution_leaves_it(net):
    report = ReplaceReport()
    model = replace_convs(net(), OREPADeepStem, report=report)
    assert report.replaced == ["stem"]
    assert "kernel_size must be at least 5" in report.skipped["head"]
    assert isinstance(model.stem, OREPADeepStem)


def test_any_callable_with_conv_arguments_is_a_block(net):
    model = replace_convs(net(), lambda *args, **kwargs: OREPAConv2d(*args, **kwargs, scaling="scalar"))
    assert model.stem.scaling == "scalar"
    assert model.depthwise.padding_mode == "reflect"


@pytest.mark.parametrize(
    ("block", "named"),
    [(RepGhostModule, "RepGhostModule does not"), (functools.partial(OREPABlock, 3), "partial"), ("orepa", "'orepa'")],
)
def test_what_cannot_be_called_as_a_convolution_is_refused(net, block, named):
    model = net()
    before = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=f"derived from RepBlock, a functools.partial .* or take nn.Conv2d's .*{named}"):
        replace_convs(model, block)
    assert [type(module) for module in model.modules()] == before


def test_a_partial_of_a_block_adds_options(net):
    block, report = functools.partial(OREPABlock, scaling="none", expansion=2), ReplaceReport()
    model = replace_convs(net(), block, fold_norm=True, report=report)
    assert model.stem.conv.scaling == "none"
    assert model.stem.conv.expansion == 2
    assert report.folded["stem"] == "norm"


def test_the_root_itself():
    conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    new = replace_convs(conv, preserve=True)
    assert isinstance(new, OREPAConv2d)
    plain = reparameterize(new.eval())
    assert type(plain) is nn.Conv2d
    assert_close(plain.weight, conv.weight, 1e-14 * largest(new.origin.weight) * 16, "round trip")


def test_flags_dtype_and_requires_grad_are_kept(net):
    model = net().half()
    model.stem.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    model.body.eval()
    replace_convs(model)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert model.head.origin.weight.requires_grad
    assert not model.head.bias.requires_grad
    assert model.stem.training
    assert not model.body[0].conv1.training


def test_convolutions_that_are_left_alone():
    class Causal(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)[..., :-1]

    class Named(nn.Conv2d):
        """Computes as nn.Conv2d does."""

    tied = nn.Conv2d(3, 3, 3)
    other = nn.Conv2d(3, 3, 3)
    other.weight = tied.weight
    model = nn.ModuleDict(
        {
            "causal": Causal(3, 3, 3),
            "named": Named(3, 3, 3),
            "rows": nn.Conv2d(3, 3, (3, 1)),
            "lazy": nn.LazyConv2d(3, 3),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
            "tied": tied,
            "other": other,
            "complex": nn.Conv2d(3, 3, 3, dtype=torch.complex64),
            "block": OREPARepVGGBlock(3, 3),
        }
    )
    report = ReplaceReport()
    replace_convs(model, report=report)
    assert report.replaced == ["named"]
    reasons = {
        "causal": "computes its own forward",
        "rows": "3x1 is not square",
        "lazy": "lazy",
        "normed": "parametrization",
        "tied": "shared",
        "other": "shared",
        "complex": "complex64",
    }
    assert set(report.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in report.skipped[name]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(2, 2, 2)), OREPABlock(2, 2, 3)])
def test_nothing_to_replace_warns(model):
    with pytest.warns(UserWarning, match="nothing to replace"):
        replace_convs(model)


def test_hooks_and_their_handles_survive(net, trained, x):
    model, seen = net().eval(), []
    forward = model.stem.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    model.stem.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    model.stem.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    trained(model)
    seen.clear()
    replace_convs(model)
    model(x.requires_grad_()).sum().backward()
    assert seen == ["before", "OREPAConv2d", "backward"]
    seen.clear()
    plain = reparameterize(model, inplace=True)
    plain(x).sum().backward()
    assert seen == ["before", "Conv2d", "backward"]
    seen.clear()
    forward.remove()
    plain(x)
    assert seen == ["before"]
