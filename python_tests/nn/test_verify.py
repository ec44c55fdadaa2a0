"""What reparameterize reports: largest differences, where they are, which block they come from."""

import json
import logging
import math

import pytest
import torch
from torch import nn

from repkern import OREPAConv2d, reparameterize
from repkern.nn import OREPABlock, OREPARepVGGBlock, ReparameterizeReport, RepBlock


class TwoHeads(nn.Module):
    def __init__(self, randomize):
        super().__init__()
        self.stem = randomize(OREPABlock(3, 6, 3, activation=nn.ReLU()))
        self.shared = randomize(OREPARepVGGBlock(6, 6, activation=nn.ReLU()))
        self.linear = OREPAConv2d(6, 2, 1)

    def forward(self, x):
        x = self.shared(self.shared(self.stem(x)))
        return {"map": self.linear(x), "features": x}


@pytest.fixture
def model(randomize):
    return TwoHeads(randomize).eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 3, 9, 7)


def test_the_report_has_what_can_be_computed_by_hand(model, x):
    report = ReparameterizeReport()
    plain = reparameterize(model, verify=x, report=report)
    assert report.converted == {"stem": "OREPABlock", "shared": "OREPARepVGGBlock", "linear": "OREPAConv2d"}
    assert [output.name for output in report.in_float64] == ["output 0", "output 1"]
    assert report.worst_in_float64.relative <= 1e-14
    assert [output.name for output in report.outputs] == ["output 0", "output 1"]
    got = list(plain(x).values())
    wanted = list(model(x).values())
    exact = list(model.double()(x.double()).values())
    unit = torch.finfo(torch.float32).eps
    for at, output in enumerate(report.outputs):
        # The comparison runs under no_grad, where blocks may round elsewhere.
        slack = 4 * unit * output.largest
        difference = (got[at].double() - exact[at]).abs()
        assert abs(output.absolute - float(difference.max())) <= slack
        assert abs(output.absolute - float(difference[output.index])) <= slack
        assert output.largest == pytest.approx(float(wanted[at].abs().max()), rel=4 * unit)
        assert output.relative == output.absolute / output.largest
        own = float((wanted[at].double() - exact[at]).abs().max())
        assert output.bound == pytest.approx(max(16 * own, 32 * unit * output.largest), abs=16 * slack)
        assert output.within_bound
    assert report.worst_output is max(report.outputs, key=lambda output: output.relative)


def test_blocks_come_in_calling_order_with_the_worst_of_their_calls(model, x):
    report = ReparameterizeReport()
    reparameterize(model, verify=x, report=report)
    assert [(block.name, block.kind) for block in report.blocks] == [
        ("stem", "OREPABlock"),
        ("shared", "OREPARepVGGBlock"),
        ("linear", "OREPAConv2d"),
    ]
    assert all(block.within_bound for block in report.blocks)
    assert report.first_beyond is None
    assert report.worst_block.relative == max(block.relative for block in report.blocks)


def test_without_verify_there_is_only_what_was_converted(model):
    report = ReparameterizeReport()
    reparameterize(model, report=report)
    assert len(report.converted) == 3
    assert (report.outputs, report.blocks, report.worst_output, report.worst_block) == ([], [], None, None)


def test_a_wrong_block_is_reported_with_place_and_size(model, x, monkeypatch):
    fuse, broken = OREPARepVGGBlock.fuse, model.shared

    def wrong(self):
        plain = fuse(self)
        if self is broken:
            plain.conv.bias.data[4] += 0.5
        return plain

    monkeypatch.setattr(OREPARepVGGBlock, "fuse", wrong)
    report = ReparameterizeReport()
    with pytest.raises(ValueError, match=r"output 0: .* the first block that differs is shared \(OREPARepVGGBlock\)"):
        reparameterize(model, inplace=True, verify=x, report=report)
    assert not report.outputs[0].within_bound
    assert report.first_beyond.name == "shared"
    assert report.first_beyond is report.worst_block
    assert report.first_beyond.index[1] == 4
    assert report.first_beyond.absolute == pytest.approx(0.5, rel=1e-4)
    assert report.blocks[0].name != "shared"
    assert report.blocks[0].within_bound


def test_nan_in_the_plain_model_is_beyond_every_bound(model, x, monkeypatch):
    fuse = OREPABlock.fuse

    def wrong(self):
        plain = fuse(self)
        plain.conv.weight.data[0] = math.nan
        return plain

    monkeypatch.setattr(OREPABlock, "fuse", wrong)
    report = ReparameterizeReport()
    with pytest.raises(ValueError, match="differs from the training form"):
        reparameterize(model, verify=x, report=report)
    assert report.outputs[0].absolute == math.inf
    json.loads(json.dumps(report.as_json(), allow_nan=False))


def test_float64_finds_what_hides_in_the_rounding_of_float32(model, x, monkeypatch):
    """A wrong epsilon, say: 5e-7 of one channel's kernel."""
    fuse, broken = OREPARepVGGBlock.fuse, model.shared

    def wrong(self):
        plain = fuse(self)
        plain.conv.weight.data[2] *= 1 + 5e-7
        return plain

    monkeypatch.setattr(OREPARepVGGBlock, "fuse", wrong)
    report = ReparameterizeReport()
    with pytest.raises(ValueError, match=r"more than rounding, as float64 shows: output 0.* is shared \(OREPARepVGG"):
        reparameterize(model, verify=x, report=report)
    assert broken is model.shared
    assert all(output.within_bound for output in report.outputs)
    assert not report.worst_in_float64.within_bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_are_held_to_their_own_rounding(model, x, dtype):
    report = ReparameterizeReport()
    reparameterize(model.to(dtype), verify=x.to(dtype), report=report)
    assert report.worst_output.relative <= 8 * torch.finfo(dtype).eps
    if dtype is torch.float64:
        assert report.in_float64 == []
    else:
        assert report.worst_in_float64.relative <= 1e-13


def test_outputs_that_are_infinite_before_conversion_are_an_error(model, x):
    model.linear.scale.weight.fill_(1e30)
    with pytest.raises(ValueError, match=r"training form itself gives NaN or infinite values on the example.*float32"):
        reparameterize(model, verify=x * 1e30)


def test_an_example_is_a_tensor_or_a_tuple(model):
    with pytest.raises(TypeError, match="must be a tensor or a tuple of arguments, got int"):
        reparameterize(model, verify=64)


def test_the_report_is_json_and_is_logged(model, x, caplog):
    report = ReparameterizeReport()
    with caplog.at_level(logging.INFO, logger="repkern"):
        reparameterize(model, verify=x, report=report)
    assert str(report) in caplog.text
    assert "worst block" in caplog.text
    values = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert values["worst_output"]["absolute"] == report.worst_output.absolute
    assert values["worst_block"]["name"] == report.worst_block.name
    assert values["first_beyond"] is None


def test_warnings_are_in_the_report_too():
    report = ReparameterizeReport()
    with pytest.warns(UserWarning, match="^reparameterize: ") as caught:
        reparameterize(OREPABlock(3, 4, 3), report=report)
    assert [f"reparameterize: {text}" for text in report.warnings] == [str(w.message) for w in caught]
    assert "train mode" in report.warnings[0]
    assert "never seen data" in report.warnings[1]
    assert {w.filename for w in caught} == {__file__}


def test_an_output_of_another_shape_is_refused(randomize, x, monkeypatch):
    block = randomize(OREPABlock(3, 4, 3)).eval()
    fuse = OREPABlock.fuse

    def wrong(self):
        plain = fuse(self)
        plain.padding = (0, 0)
        return plain

    monkeypatch.setattr(OREPABlock, "fuse", wrong)
    with pytest.raises(ValueError, match=r"shapes \[\[2, 4, 7, 5\]\].*\[\[2, 4, 9, 7\]\]"):
        reparameterize(block, verify=x)


class Outer(RepBlock):
    """A block whose activation holds a block, and whose convolution is another one's."""

    def __init__(self, inner, gate):
        super().__init__(geometry(inner), gate)
        self.inner = inner

    def _fold(self):
        return self.inner._fold()

    def forward(self, x):
        return self._activate(self.inner(x))


def geometry(block):
    from repkern.nn.geometry import check_geometry

    return check_geometry(block.in_channels, block.out_channels, block.kernel_size)


def test_nested_blocks_are_folded_and_those_behind_the_convolution_converted(randomize, x):
    inner, gate = randomize(OREPABlock(3, 4, 3)), nn.Sequential(randomize(OREPARepVGGBlock(4, 4)), nn.Sigmoid())
    model = nn.Sequential(Outer(inner, gate)).eval()
    report = ReparameterizeReport()
    plain = reparameterize(model, verify=x, report=report)
    assert not any(isinstance(module, RepBlock) for module in plain.modules())
    assert report.converted == {"0": "Outer", "0.activation.0": "OREPARepVGGBlock"}
    assert {block.name for block in report.blocks} == {"0", "0.activation.0"}
    assert isinstance(model[0].activation[0], OREPARepVGGBlock), "the model given must stay"


class Fusable(nn.Module):
    """What RepGhostModule is: two convolutions in one module, so no RepBlock, but with fuse()."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x) + 1

    def fuse(self):
        return nn.Sequential(self.conv.fuse(), AddOne())


class AddOne(nn.Module):
    def forward(self, x):
        return x + 1


def test_fuse_of_foreign_modules_is_not_called(randomize, x):
    plain = reparameterize(nn.Sequential(Fusable(randomize(OREPABlock(3, 4, 3)))).eval(), verify=x)
    assert type(plain[0]) is Fusable
    assert type(plain[0].conv) is nn.Conv2d


def test_fuse_of_our_other_modules_and_their_subclasses_is(randomize, x, monkeypatch):
    class Subclass(Fusable):
        pass

    monkeypatch.setattr(Fusable, "__module__", "repkern.nn.imagined")
    report = ReparameterizeReport()
    plain = reparameterize(nn.Sequential(Subclass(randomize(OREPABlock(3, 4, 3)))).eval(), verify=x, report=report)
    assert type(plain[0]) is nn.Sequential
    assert report.converted == {"0": "Subclass"}
