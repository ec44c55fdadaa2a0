"""DyRep's checkpoints: the blocks that grew during training, on a clean model of plain convolutions."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern import load_checkpoint, reparameterize
from repkern.models import create_model
from repkern.nn import ConvNormAct
from repkern.nn.dyrep import DyRepBlock
from repkern.testing import assert_close

FLOAT64 = {"dtype": torch.float64}
ALL = ("1x1", "1x1_kxk", "1x1_avg", "kxk", "1xk", "kx1", "id")
INNER = ("1x1_kxk", "1x1_avg", "kxk")  # of a block without padding


class Net(nn.Module):
    """A user's own network: a stem, a stage, convolutions that others follow by a norm."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False, **FLOAT64)
        self.bn1 = nn.BatchNorm2d(8, **FLOAT64)
        self.layer1 = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, bias=False, **FLOAT64),
            nn.BatchNorm2d(8, **FLOAT64),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False, **FLOAT64),
        )
        self.fc = nn.Linear(8, 5, **FLOAT64)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer1(x).mean((2, 3)))


def write_block(t, p, co, ci, branches, groups=1, nested=()):
    """A block's tensors; `nested` names the inner convolutions that are blocks themselves, or have been ones."""
    for name, size in (("1x1", 1), ("1xk", (1, 3)), ("kx1", (3, 1))):
        if name in branches:
            t.conv_norm(f"{p}dbb_{name}.", co, ci, size, groups)
    if "1x1_kxk" in branches:
        t.conv(f"{p}dbb_1x1_kxk.conv1", ci, ci, 1, groups)
        t.norm(f"{p}dbb_1x1_kxk.bn1.bn", ci)
        if "expand" in nested:
            write_block(t, f"{p}dbb_1x1_kxk.conv2.", co, ci, INNER, groups)
        else:
            t.conv(f"{p}dbb_1x1_kxk.conv2", co, ci, 3, groups, bias="cut expand" in nested)
        t.norm(f"{p}dbb_1x1_kxk.bn2", co)
    if "1x1_avg" in branches:
        if groups < co:
            t.conv(f"{p}dbb_1x1_avg.conv", co, ci, 1, groups)
            t.norm(f"{p}dbb_1x1_avg.bn.bn", co)
        t.norm(f"{p}dbb_1x1_avg.avgbn", co)
    if "dense" in nested:
        write_block(t, f"{p}dbb_kxk.conv.", co, ci, ("1x1", "kxk"), groups)
    else:
        t.conv(f"{p}dbb_kxk.conv", co, ci, 3, groups, bias=True)
    t.norm(f"{p}dbb_kxk.bn", co)
    if "id" in branches:
        t.norm(f"{p}dbb_id", co)


def run(r, t, x, p, stride=1, padding=1, groups=1):
    """A convolution, plain or grown, in eval mode."""
    if f"{p}dbb_kxk.bn.weight" not in t:
        return r.conv(t, x, p.removesuffix("."), stride, padding, groups)

    def bordered(y, name):
        _, shift = r.scale_and_shift(t, name)
        return functional.pad(r.norm(t, y, name) - shift[:, None, None], (padding,) * 4) + shift[:, None, None]

    y = r.norm(t, run(r, t, x, f"{p}dbb_kxk.conv.", stride, padding, groups), f"{p}dbb_kxk.bn")
    for name, pad in (("1x1", 0), ("1xk", (0, padding)), ("kx1", (padding, 0))):
        if f"{p}dbb_{name}.conv.weight" in t:
            y = y + r.norm(t, r.conv(t, x, f"{p}dbb_{name}.conv", stride, pad, groups), f"{p}dbb_{name}.bn")
    if f"{p}dbb_1x1_kxk.conv1.weight" in t:
        inner = bordered(r.conv(t, x, f"{p}dbb_1x1_kxk.conv1", groups=groups), f"{p}dbb_1x1_kxk.bn1.bn")
        inner = run(r, t, inner, f"{p}dbb_1x1_kxk.conv2.", stride, 0, groups)
        y = y + r.norm(t, inner, f"{p}dbb_1x1_kxk.bn2")
    if f"{p}dbb_1x1_avg.avgbn.weight" in t:
        mean = functional.pad(x, (padding,) * 4)
        if f"{p}dbb_1x1_avg.conv.weight" in t:
            mean = bordered(r.conv(t, x, f"{p}dbb_1x1_avg.conv", groups=groups), f"{p}dbb_1x1_avg.bn.bn")
        y = y + r.norm(t, functional.avg_pool2d(mean, 3, stride), f"{p}dbb_1x1_avg.avgbn")
    return y + r.norm(t, x, f"{p}dbb_id") if f"{p}dbb_id.weight" in t else y


def write_net(released, first=ALL[:-1], second=ALL, nested=("dense", "expand"), depthwise=ALL):
    """None for `first` and the others: a convolution that was a block and has been cut to one with bias."""
    t = released.Tensors()
    for p, co, ci, branches, groups, inner in (
        ("conv1.", 8, 3, first, 1, ()),
        ("layer1.0.", 8, 8, second, 1, nested),
        ("layer1.3.", 8, 8, depthwise, 8, ()),
    ):
        if branches is None:
            t.conv(p.removesuffix("."), co, ci, 3, groups, bias=True)
        else:
            write_block(t, p, co, ci, branches, groups, inner)
    t.norm("bn1", 8)
    t.norm("layer1.1", 8)
    t.linear("fc", 5, 8)
    return t


def run_net(r, t, x):
    x = torch.relu(r.norm(t, run(r, t, x, "conv1.", 2), "bn1"))
    x = torch.relu(r.norm(t, run(r, t, x, "layer1.0."), "layer1.1"))
    return r.pooled(t, run(r, t, x, "layer1.3.", groups=8), "fc")


def graph(t):
    """What the released code writes beside the tensors; the flag of "id" is what was asked for, not what there is."""
    marks = [name.removesuffix("dbb_kxk.bn.running_mean") for name in t if name.endswith("dbb_kxk.bn.running_mean")]
    norms = ("1x1.bn", "1x1_kxk.bn2", "1x1_avg.avgbn", "kxk.bn", "1xk.bn", "kx1.bn")
    flags = {p: [int(f"{p}dbb_{name}.weight" in t) for name in norms] + [1] for p in marks}
    return {"dbb_graph": [(p.removesuffix("."), flags[p]) for p in sorted(flags, key=lambda p: p.count("."))]}


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    "forms",
    [
        {},
        {"first": None, "nested": ("cut expand",)},
        {"first": ("kxk", "1x1"), "nested": (), "depthwise": None},
        {"nested": ("expand",), "depthwise": ("kxk", "1x1_avg", "id")},
    ],
    ids=["nested", "top-level cut", "top-level grown", "subsets"],
)
def test_graph_is_rebuilt_on_a_clean_model(released, x, forms, tmp_path, caplog):
    t = write_net(released, **forms)
    torch.save({"model": dict(t), "dyrep": graph(t), "epoch": 3}, tmp_path / "dyrep.pth")
    net, seen = Net().eval(), []
    net.layer1[0].register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level(logging.WARNING, "repkern"):
        model = load_checkpoint(tmp_path / "dyrep.pth", net)
    assert not caplog.records
    assert model is net
    expected, bound = released.uncertainty(lambda images: run_net(released, t, images), x)
    assert_close(model(x), expected, bound, "output")
    assert seen == [1]
    assert isinstance(model.conv1, nn.Conv2d if forms.get("first", ALL) is None else DyRepBlock)
    assert_close(reparameterize(copy.deepcopy(model))(x), expected, bound, "deployed output")
    # Once the blocks are there, the same file loads again, and so does one of other branches.
    blocks = [id(module) for module in model.modules() if isinstance(module, DyRepBlock)]
    load_checkpoint(t, model, layout="dyrep")
    assert blocks == [id(module) for module in model.modules() if isinstance(module, DyRepBlock)]
    for options in ({"second": ("kxk", "kx1"), "nested": ()}, {"nested": ("dense",)}, {"nested": ()}):
        other = write_net(released, **{**forms, **options})
        load_checkpoint(other, model)
        expected, bound = released.uncertainty(lambda images, other=other: run_net(released, other, images), x)
        assert_close(model(x), expected, bound, f"output with other blocks {options}")


def absent_norm(t):
    del t["bn1.weight"]


def block_in_place_of_a_norm(t):
    t.conv("layer1.1.dbb_kxk.conv", 8, 8, 3)
    t.norm("layer1.1.dbb_kxk.bn", 8)


def absent_kernel(t):
    del t["layer1.0.dbb_1x1_avg.conv.weight"]


@pytest.mark.parametrize("spoil", [absent_norm, block_in_place_of_a_norm, absent_kernel])
def test_failure_leaves_the_model_as_it_was(released, x, spoil):
    t = write_net(released)
    beside = graph(t)
    spoil(t)
    net = Net().eval()
    before, modules, output = net.state_dict().keys(), list(net.modules()), net(x)
    with pytest.raises(ValueError, match=r"does not match|no nn\.Conv2d"):
        load_checkpoint({"model": t, "dyrep": beside}, net)
    assert all(now is then for now, then in zip(net.modules(), modules, strict=True))
    assert net.state_dict().keys() == before
    assert torch.equal(net(x), output)


def test_inside_our_networks(released):
    """torchvision's names, in a network whose convolutions are blocks with their norm: the norm stays beside it."""
    model = create_model("resnet18", num_classes=5, width=0.125).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
    plain = {name: value for name, value in model.state_dict().items() if not name.startswith("stages.1.0.conv2.conv.")}
    t = released.Tensors()
    t |= {name: value.clone() for name, value in plain.items()}
    write_block(t, "stages.1.0.conv2.conv.", 16, 16, ALL)
    names = [("stages.3.", "layer4."), ("stages.2.", "layer3."), ("stages.1.", "layer2."), ("stages.0.", "layer1.")]
    names += [("stem.conv.", "conv1."), ("stem.bn.", "bn1."), ("head.", "fc.")]
    names += [("conv1.bn.", "bn1."), ("conv2.bn.", "bn2."), ("conv2.conv.weight", "conv2.weight")]
    names += [("0.conv1.conv.", "0.conv1."), ("1.conv1.conv.", "1.conv1."), ("conv2.conv.dbb", "conv2.dbb")]
    names += [("shortcut.conv.", "downsample.0."), ("shortcut.bn.", "downsample.1.")]
    vision = released.renamed(t, names)
    assert "layer2.0.conv2.dbb_kxk.conv.bias" in vision
    assert "layer4.1.conv1.weight" in vision
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    load_checkpoint(vision, model)
    unit = model.stages[1][0]
    assert isinstance(unit.conv2.conv, DyRepBlock)
    assert isinstance(unit.conv1, ConvNormAct)
    y = unit.conv1(torch.ones(1, 8, 8, 8, dtype=torch.float64))
    expected = released.norm(t, run(released, t, y, "stages.1.0.conv2.conv."), "stages.1.0.conv2.bn")
    assert_close(unit.conv2(y), expected, 1e-12 * float(expected.detach().abs().max()), "grown layer and its norm")
    output = model(x).detach()
    assert_close(reparameterize(model)(x), output, 1e-10 * float(output.abs().max()), "deployed")


def test_deployed_file(released, x):
    """Its convolutions have a bias, those of the clean model none."""
    plain, t = Net().eval(), released.Tensors()
    for name in ("conv1", "layer1.0", "layer1.3"):
        conv = plain.get_submodule(name)
        t.conv(f"{name}.conv_deployed", conv.out_channels, conv.in_channels, 3, conv.groups, bias=True)
    t.norm("bn1", 8)
    t.norm("layer1.1", 8)
    t.linear("fc", 5, 8)
    deployed = {name.replace(".conv_deployed", ""): value for name, value in t.items()}
    expected, bound = released.uncertainty(lambda images: run_net(released, deployed, images), x)
    assert_close(load_checkpoint(t, plain)(x), expected, bound, "output")


def test_graph_that_disagrees_is_logged(released, caplog):
    t = write_net(released)
    wrong = graph(t)
    wrong["dbb_graph"] = [entry for entry in wrong["dbb_graph"] if entry[0] != "conv1"]
    with caplog.at_level(logging.WARNING, "repkern"):
        load_checkpoint({"model": t, "dyrep": wrong}, Net())
        load_checkpoint({"model": t, "dyrep": "?"}, Net())
    assert "graph gives conv1 the branches none" in caplog.text
    assert "holds no graph" in caplog.text
