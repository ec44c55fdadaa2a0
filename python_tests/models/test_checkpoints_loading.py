"""load_checkpoint around the importers: what it says, what it leaves alone, and blocks in a user's own network."""

import argparse
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern import load_checkpoint
from repkern.models import create_model
from repkern.models.checkpoints import LoadReport
from repkern.nn import CSLAConv2d, DiracConv2d, OREPAConv2d, replace_convs
from repkern.nn.acb import ACBlock
from repkern.nn.dbb import DiverseBranchBlock
from repkern.nn.kinds import KINDS
from repkern.nn.qarepvgg import QARepVGGBlock
from repkern.nn.repvgg import RepVGGBlock
from repkern.testing import assert_close

FLOAT64 = {"dtype": torch.float64}


class Own(nn.Module):
    """A user's network, which happens to name its layers as a released one does."""

    def __init__(self):
        super().__init__()
        self.stage0 = RepVGGBlock(3, 8, 3, 2, activation=nn.ReLU(), **FLOAT64)
        self.stage1 = nn.Sequential(ACBlock(8, 8, 3, **FLOAT64), QARepVGGBlock(8, 8, 3, **FLOAT64))
        self.linear = nn.Linear(8, 2, **FLOAT64)

    def forward(self, x):
        return self.linear(self.stage1(self.stage0(x)).mean((2, 3)))


def write_own(released):
    t = released.Tensors()
    released.write_repvgg_block(t, "stage0.", 3, 8, 2, 1)
    for name, size in (("square", 3), ("ver", (3, 1)), ("hor", (1, 3))):
        t.conv_norm("stage1.0.", 8, 8, size, conv=f"{name}_conv", norm=f"{name}_bn")
    t.conv_norm("stage1.1.rbr_dense.", 8, 8, 3)
    t.conv("stage1.1.rbr_1x1", 8, 8, 1)
    t.norm("stage1.1.bn", 8)
    t.linear("linear", 2, 8)
    return t


def run_own(r, t, x):
    x = r.repvgg_block(t, x, "stage0.", 2, 1)
    x = sum(
        r.norm(t, r.conv(t, x, f"stage1.0.{name}_conv", 1, padding), f"stage1.0.{name}_bn")
        for name, padding in (("square", 1), ("ver", (1, 0)), ("hor", (0, 1)))
    )
    y = r.norm(t, r.conv(t, x, "stage1.1.rbr_dense.conv", 1, 1), "stage1.1.rbr_dense.bn")
    x = r.norm(t, y + r.conv(t, x, "stage1.1.rbr_1x1") + x, "stage1.1.bn")
    return r.pooled(t, x, "linear")


def test_blocks_of_several_layouts_in_a_users_network(released):
    t = write_own(released)
    x = torch.randn(2, 3, 12, 12, **FLOAT64)
    expected, bound = released.uncertainty(lambda images: run_own(released, t, images), x)
    report = LoadReport()
    assert_close(load_checkpoint(t, Own().eval(), report=report)(x), expected, bound, "output")
    assert report.layouts == ["acnet", "qarepvgg", "repvgg"]
    inside = {f"encoder.backbone.{name}": value for name, value in t.items()}
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"backbone": Own().eval()})})
    load_checkpoint(inside, model)
    assert_close(model["encoder"]["backbone"](x), expected, bound, "output of the encoder")


def test_a_released_network_inside_a_users(released):
    """Layers are renamed under any prefix."""
    backbone = create_model("repvgg_a0", num_classes=5, width=0.125).double()
    rows = released.repvgg_layers((2, 4, 14, 1), [feature.channels for feature in backbone.feature_info])
    t = {f"backbone.{name}": value for name, value in released.write_repvgg(rows, 5).items()}
    t["decoder.weight"], t["decoder.bias"] = torch.zeros(3, 2, 1, 1), torch.ones(3)
    model = nn.ModuleDict({"backbone": backbone, "decoder": nn.Conv2d(2, 3, 1)})
    load_checkpoint(t, model)
    assert torch.equal(backbone.stages[2][3].dense.weight, t["backbone.stage3.3.rbr_dense.conv.weight"])
    assert model["decoder"].bias.sum() == 3


def test_strict_false_loads_the_rest_and_says_so(released, caplog):
    t = write_own(released)
    del t["stage1.1.bn.weight"]
    t["linear.weight"] = torch.zeros(3, 8, **FLOAT64)
    t["extra"] = torch.zeros(1)
    model = Own()
    before = model.linear.weight.clone()
    report = LoadReport()
    with caplog.at_level(logging.WARNING, "repkern"):
        assert load_checkpoint(t, model, strict=False, report=report) is model
    assert report.missing == ["stage1.1.post_bn.weight"]
    assert report.unexpected == ["extra"]
    assert report.mismatched == {"linear.weight": ((3, 8), (2, 8))}
    assert "stage1.1.post_bn.bias" in report.loaded
    for line in report.problems:
        assert line in caplog.text
    assert torch.equal(model.linear.weight, before)
    assert torch.equal(model.stage0.dense.weight, t["stage0.rbr_dense.conv.weight"])


@pytest.mark.parametrize("release", ["deployed", "train"])
def test_deploy_weights_in_a_train_file(released, release):
    """RepVGG issue 67: what was found and what to do come before the list."""
    widths = [feature.channels for feature in create_model("repvgg_a0", width=0.125).feature_info]
    rows = released.repvgg_layers((2, 4, 14, 1), widths)
    t = released.write_repvgg(rows, 1000)
    if release == "deployed":
        t = released.deploy_repvgg(t, rows)
    model = create_model("repvgg_a0", width=0.125, block="repvgg" if release == "deployed" else "plain")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="22 blocks") as caught:
        load_checkpoint({"state_dict": t}, model)
    first = str(caught.value).splitlines()[1]
    assert "first stem" in first
    assert ("deployed in the checkpoint and in training form here" in first) is (release == "deployed")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_entries_beside_the_model(released, tmp_path, caplog):
    t = write_own(released)
    averaged = {name: value + 1 for name, value in t.items()}
    file = {"model": dict(t), "model_ema": averaged, "epoch": 7, "args": argparse.Namespace(lr=0.1), "optimizer": {}}
    torch.save(file, tmp_path / "run.pth")
    report = LoadReport()
    with caplog.at_level(logging.INFO, "repkern"):
        model = load_checkpoint(tmp_path / "run.pth", Own(), report=report)
    assert report.beside == ["args", "epoch", "model_ema", "optimizer"]
    assert "not read: args, epoch, model_ema, optimizer" in caplog.text
    assert torch.equal(model.linear.bias, t["linear.bias"])
    load_checkpoint(tmp_path / "run.pth", model, ema=True)
    assert torch.equal(model.linear.bias, averaged["linear.bias"])
    with pytest.raises(ValueError, match="no averaged weights"):
        load_checkpoint({"model": dict(t)}, model, ema=True)


def test_files_without_counts_of_batches(released):
    """Of torch before 0.4.1."""
    t = {name: value for name, value in write_own(released).items() if "num_batches" not in name}
    report = LoadReport()
    model = Own()
    model.stage1[1].post_bn.num_batches_tracked.fill_(5)
    load_checkpoint(t, model, report=report)
    assert len(report.counts) == 7
    assert model.stage1[1].post_bn.num_batches_tracked == 0


def test_wrapped_models(released):
    t = write_own(released)
    parallel = nn.DataParallel(Own())
    assert load_checkpoint({f"module.{name}": value for name, value in t.items()}, parallel) is parallel
    assert torch.equal(parallel.module.linear.bias, t["linear.bias"])
    compiled = torch.compile(Own(), backend="eager")
    assert load_checkpoint(t, compiled) is compiled
    assert torch.equal(compiled.linear.bias, t["linear.bias"])


def test_features_only_takes_what_it_has(released):
    options = {"num_classes": 5, "width": 0.125}
    widths = [feature.channels for feature in create_model("repvgg_a0", **options).feature_info]
    t = released.write_repvgg(released.repvgg_layers((2, 4, 14, 1), widths), 5)
    backbone = create_model("repvgg_a0", features_only=True, out_indices=(1, 3), **options).double()
    report = LoadReport()
    load_checkpoint(t, backbone, report=report)
    assert torch.equal(backbone.stages[2][13].dense.weight, t["stage3.13.rbr_dense.conv.weight"])
    assert {name.split(".")[0] for name in report.left_out} == {"head", "stages"}
    with pytest.raises(ValueError, match=r"\(1 problems\):\s+unexpected: stages\.2\.14\.more"):
        load_checkpoint({**t, "stage3.14.more": torch.zeros(1)}, backbone)


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_names_stay(kind):
    """No importer takes a block of ours for a released one."""
    with torch.device("meta"):
        state = create_model("resnet18", block=kind).state_dict()
    report = LoadReport()
    assert load_checkpoint(state, report=report).keys() == state.keys()
    assert report.layouts == ["repkern"]
    assert report.loaded == list(state)


def test_half_precision_files_load_into_float32(released):
    t = {name: value.half() if value.is_floating_point() else value for name, value in write_own(released).items()}
    model = Own().float()
    load_checkpoint(t, model)
    assert model.linear.weight.dtype == torch.float32
    assert torch.equal(model.linear.weight, t["linear.weight"].float())


def test_identity_based_1x1_of_an_inner_width_of_its_own(released):
    """A depthwise DBB has a plain 1x1, conv1, where others have idconv1, the deviation from an identity."""
    block = DiverseBranchBlock(4, 4, 3, groups=4, **FLOAT64).eval()
    t = released.Tensors()
    t.conv_norm("dbb_origin.", 4, 4, 3, 4)
    t.norm("dbb_avg.avgbn", 4)
    t.conv("dbb_1x1_kxk.conv1", 8, 4, 1, 4)
    t.norm("dbb_1x1_kxk.bn1.bn", 8)
    t.conv("dbb_1x1_kxk.conv2", 4, 8, 3, 4)
    t.norm("dbb_1x1_kxk.bn2", 4)
    load_checkpoint(t, block)
    x = torch.randn(1, 4, 6, 6, **FLOAT64)
    inner = released.norm(t, released.conv(t, x, "dbb_1x1_kxk.conv1", groups=4), "dbb_1x1_kxk.bn1.bn")
    _, shift = released.scale_and_shift(t, "dbb_1x1_kxk.bn1.bn")
    inner = functional.pad(inner - shift[:, None, None], (1, 1, 1, 1)) + shift[:, None, None]
    y = released.norm(t, released.conv(t, inner, "dbb_1x1_kxk.conv2", groups=4), "dbb_1x1_kxk.bn2")
    y = y + released.norm(t, released.conv(t, x, "dbb_origin.conv", 1, 1, 4), "dbb_origin.bn")
    y = y + released.norm(t, functional.avg_pool2d(x, 3, 1, 1), "dbb_avg.avgbn")
    assert_close(block(x), y, 1e-12 * float(y.abs().max()), "output")


def test_what_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "text.pth").write_text("hello world")
    with pytest.raises(ValueError, match=r"text\.pth is damaged or not a checkpoint \(KeyError"):
        load_checkpoint(tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError, match="which is a folder"):
        load_checkpoint(str(tmp_path))
    with pytest.raises(TypeError, match="must be a path or a dictionary, got NoneType"):
        load_checkpoint(None)


class Plain(nn.Module):
    """A user's network; `bias`: of its first convolution, which no norm follows."""

    def __init__(self, bias=True):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.conv = nn.Conv2d(8, 8, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.bn(self.conv(self.first(x).relu())).mean((2, 3)))


def pretrained(bias=True):
    model = Plain(bias).double().eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("block", [OREPAConv2d, CSLAConv2d, DiracConv2d, DiverseBranchBlock, ACBlock, RepVGGBlock])
def test_plain_weights_start_the_blocks_of_a_replaced_model(block):
    """Written down for `replace_convs(preserve=True)`, when the weights come later."""
    source = pretrained()
    model = replace_convs(Plain().double().eval(), block)
    report = LoadReport()
    x = torch.randn(2, 3, 9, 9, **FLOAT64)
    load_checkpoint({"state_dict": {f"module.{name}": t for name, t in source.state_dict().items()}}, model,
                    report=report)  # fmt: skip
    assert report.started == ["first", "conv"]
    assert report.missing == report.unexpected == []
    assert set(report.loaded) == set(source.state_dict())
    expected = source(x).detach()
    assert_close(model(x).detach(), expected, 1e-12 * float(expected.abs().max()), "output")


def test_plain_weights_of_another_shape_or_with_no_place_change_nothing():
    source = pretrained()
    model = replace_convs(Plain(bias=False).double().eval(), OREPAConv2d)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"first: .*has no bias to take"):
        load_checkpoint(source.state_dict(), model)
    narrow = {**source.state_dict(), "conv.weight": torch.zeros(8, 4, 3, 3, **FLOAT64)}
    del narrow["first.bias"]
    with pytest.raises(ValueError, match=r"conv\.weight\) are of a plain network.*replace_convs\(model.*preserve=True"):
        load_checkpoint(narrow, model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_norms_that_blocks_took_over_are_explained():
    model = replace_convs(Plain().double().eval(), DiverseBranchBlock, fold_norm=True)
    with pytest.raises(ValueError, match=r"bn\.running_mean\) are of a plain network.*load them into the plain model"):
        load_checkpoint(pretrained().state_dict(), model)


@pytest.mark.parametrize("whole", [False, True])
def test_timm_features_only_names(whole):
    """timm makes every stage a child of its own: stages_0, stages_1, ..."""
    model = create_model("repvgg_a0", width=0.25, num_classes=3, features_only=not whole)
    other = create_model("repvgg_a0", width=0.25, num_classes=3, features_only=not whole)
    parts = {"dense.": "conv_kxk.conv.", "dense_bn.": "conv_kxk.bn.", "pointwise.": "conv_1x1.conv.",
             "pointwise_bn.": "conv_1x1.bn.", "identity_bn.": "identity."}  # fmt: skip
    tensors = {}
    for name, tensor in other.state_dict().items():
        new = name.replace("stages.", "stages_")
        for ours, theirs in parts.items():
            new = new.replace(f".{ours}", f".{theirs}")
        tensors[new] = tensor
    assert any(name.startswith("stages_0.0.conv_kxk.conv") for name in tensors)
    load_checkpoint(tensors, model)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert not whole or set(load_checkpoint(tensors)) == set(other.state_dict())
