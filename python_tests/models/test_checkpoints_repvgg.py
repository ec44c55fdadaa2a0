"""Networks of RepVGG's shape by their released names: RepVGG, RepVGGplus, RepOpt-VGG, timm."""

import pytest
import torch

from repkern import load_checkpoint
from repkern.models import create_model
from repkern.models.checkpoints import LoadReport
from repkern.testing import assert_close

A = (2, 4, 14, 1)
B = (4, 6, 16, 1)
D = (8, 14, 24, 1)
A0 = (48, 48, 96, 192, 1280)
TIMM = [(f"stage{at}.", f"stages.{at - 1}.") for at in range(1, 5)] + [
    ("stage0.", "stem."),
    ("rbr_dense", "conv_kxk"),
    ("rbr_1x1", "conv_1x1"),
    ("rbr_identity", "identity"),
    ("rbr_reparam", "reparam_conv"),
    ("se.down", "attn.fc1"),
    ("se.up", "attn.fc2"),
    ("linear.", "head.fc."),
]


def network(name, **options):
    return create_model(name, num_classes=7, **options).double().eval()


def channels(model):
    return [feature.channels for feature in model.feature_info]


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


@pytest.fixture
def same(released, x):
    def prepare(t, rows, block):
        """A function that compares a model with the released network of these tensors."""
        expected, bound = released.uncertainty(lambda images: released.run_blocks(t, images, rows, block), x)
        assert bound < 1e-6 * float(expected.abs().max())
        return lambda model: assert_close(model(x), expected, bound, "output")

    return prepare


def test_repvgg_a0_as_released(released, same, tmp_path):
    """The file as it lies on the net: 351 tensors in training form, 46 deployed, at full width."""
    rows = released.repvgg_layers(A, A0)
    t = released.write_repvgg(rows, 1000)
    assert len(t) == 351
    assert list(t)[:2] == ["stage0.rbr_dense.conv.weight", "stage0.rbr_dense.bn.weight"]
    assert "stage1.1.rbr_identity.weight" in t
    torch.save(dict(t), tmp_path / "RepVGG-A0-train.pth")
    check = same(t, rows, released.repvgg_block)
    model = load_checkpoint(tmp_path / "RepVGG-A0-train.pth", create_model("repvgg_a0").double().eval())
    check(model)
    deployed = released.deploy_repvgg(t, rows)
    assert len(deployed) == 46
    plain = create_model("repvgg_a0", block="plain").double().eval()
    report = LoadReport()
    load_checkpoint({"state_dict": {f"module.{name}": v for name, v in deployed.items()}}, plain, report=report)
    check(plain)
    assert report.layouts == ["repvgg"]
    assert len(report.loaded) == 46
    assert not report.problems


@pytest.mark.parametrize(
    ("name", "layers", "groups", "excite"),
    [("repvgg_b1g4", B, 4, {}), ("repvgg_d2se", D, 1, {"se": 16}), ("repvgg_b2g2", B, 2, {})],
)
def test_groups_and_squeeze_excite(released, same, name, layers, groups, excite):
    model, plain = network(name, width=0.125), network(name, width=0.125, block="plain")
    rows = released.repvgg_layers(layers, channels(model), groups)
    t = released.write_repvgg(rows, 7, **excite)
    check = same(t, rows, released.repvgg_block)
    check(load_checkpoint(t, model))
    check(load_checkpoint(released.deploy_repvgg(t, rows), plain))
    timm, timm_deployed = (released.renamed(form, TIMM) for form in (t, released.deploy_repvgg(t, rows)))
    assert "stages.2.5.conv_kxk.bn.running_var" in timm
    check(load_checkpoint(timm, network(name, width=0.125), layout="timm"))
    check(load_checkpoint(timm_deployed, network(name, width=0.125, block="plain")))


def test_orepa_vgg(released, same):
    """A sixth row of `vector`, which nothing reads, where there is an identity."""
    model = network("repvgg_a0", block="orepa_vgg", width=0.125)
    rows = released.repvgg_layers(A, channels(model))
    t = released.Tensors()
    for p, ci, co, stride, _ in rows:
        released.write_repvgg_block(t, p, ci, co, stride, 1)
        del t[f"{p}rbr_dense.conv.weight"]
        t.orepa_kernel(f"{p}rbr_dense.weight_rbr_", co, ci, rows=6 if stride == 1 else 5)
    t.linear("linear", 7, rows[-1][2])

    def block(t, x, p, stride, groups):
        dense = {f"{p}rbr_dense.conv.weight": released.orepa_kernel(t, f"{p}rbr_dense.weight_rbr_")}
        return released.repvgg_block({**t, **dense}, x, p, stride, groups)

    check = same(t, rows, block)
    check(load_checkpoint(t, model))
    check(load_checkpoint({"state_dict": t}, network("repvgg_a0", block="orepa_vgg", width=0.125), layout="orepa"))


@pytest.mark.parametrize(
    ("name", "channels"), [("repvgg_b1g4", (64, 128, 256, 512, 2048)), ("repvgg_d2se", (64, 160, 320, 640, 2560))]
)
def test_shapes_at_full_width(released, name, channels):
    layers, excite = (D, {"se": 16}) if name.endswith("se") else (B, {})
    rows = released.repvgg_layers(layers, channels, 4 if name.endswith("g4") else 1)
    with torch.device("meta"):
        ours = create_model(name).state_dict()
    theirs = load_checkpoint(released.write_repvgg(rows, 1000, "meta", **excite))
    theirs = {name.replace(".conv.dense", ".dense"): t for name, t in theirs.items()}
    assert {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in ours.items()}


def test_repvggplus(released, same):
    """Squeeze-excite behind the ReLU, stages of `blocks`, the third one cut in two, and three auxiliary heads."""
    model = network("repopt_vgg_l2_se", block="repvgg", width=0.125)
    rows = released.repvgg_layers(D, channels(model))
    t = released.write_repvgg(rows, 7, post_se=4)
    check = same(t, rows, released.repvgg_block)
    names = [(f"stage{at}.", f"stage{at}.blocks.") for at in (1, 2, 4)]
    names += [(f"stage3.{at}.", f"stage3_first.blocks.{at}.") for at in range(12)]
    names += [(f"stage3.{at}.", f"stage3_second.blocks.{at - 12}.") for at in range(12, 24)]
    plus = released.Tensors()
    plus |= released.renamed(t, names)
    for stage, width in (("stage1", 1), ("stage2", 2), ("stage3_first", 3)):
        plus.conv_norm(f"{stage}_aux.0.", channels(model)[width], channels(model)[width], 3)
        plus.linear(f"{stage}_aux.3", 7, channels(model)[width])
    report = LoadReport()
    check(load_checkpoint({"model": plus, "epoch": 3, "optimizer": {"state": {}}}, model, report=report))
    assert len(report.left_out) == 3 * 8
    assert all("_aux." in name for name in report.left_out)
    assert report.beside == ["epoch", "optimizer"]


# --- RepOptimizers


def write_repopt(released, rows, mode, post_se, device="cpu"):
    t = released.Tensors(device)
    for prefix, ci, co, stride, _ in rows:
        if mode == "repvgg":
            t.conv_norm(prefix, co, ci, 3, conv="conv_3x3", norm="bn_3x3")
            t.conv_norm(prefix, co, ci, 1, conv="conv_1x1", norm="bn_1x1")
            if ci == co and stride == 1:
                t.norm(f"{prefix}bn_identity", co)
        else:
            t.conv_norm(prefix, co, ci, 3)
        if mode == "csla":
            t.conv(f"{prefix}conv_1x1", co, ci, 1)
            for name in ("conv", "1x1", *(("identity",) if ci == co and stride == 1 else ())):
                t.uniform(f"{prefix}scale_{name}.weight", co)
        if post_se:
            t.excite(f"{prefix}post_se", co, max(1, co // 4))
    t.linear("linear", 7, rows[-1][2])
    return t


def repopt_block(released):
    def scaled(t, x, prefix, name):
        return x * t[f"{prefix}scale_{name}.weight"][:, None, None] if f"{prefix}scale_{name}.weight" in t else 0

    def block(t, x, prefix, stride, groups):
        if f"{prefix}conv_3x3.weight" in t:
            y = released.norm(t, released.conv(t, x, f"{prefix}conv_3x3", stride, 1), f"{prefix}bn_3x3")
            y = y + released.norm(t, released.conv(t, x, f"{prefix}conv_1x1", stride), f"{prefix}bn_1x1")
            y = y + released.norm(t, x, f"{prefix}bn_identity") if f"{prefix}bn_identity.bias" in t else y
        else:
            y = released.conv(t, x, f"{prefix}conv", stride, 1)
            if f"{prefix}scale_conv.weight" in t:
                y = scaled(t, y, prefix, "conv") + scaled(t, x, prefix, "identity")
                y = y + scaled(t, released.conv(t, x, f"{prefix}conv_1x1", stride), prefix, "1x1")
            y = released.norm(t, y, f"{prefix}bn")
        y = torch.relu(y)
        return released.excited(t, y, f"{prefix}post_se") if f"{prefix}post_se.up.bias" in t else y

    return block


@pytest.mark.parametrize(("mode", "block"), [("target", "conv_bn"), ("csla", "csla"), ("repvgg", "repvgg")])
@pytest.mark.parametrize("name", ["repopt_vgg_b1", "repopt_vgg_l1_se"])
def test_repopt_vgg(released, same, name, mode, block):
    model = network(name, block=block, width=0.125)
    rows = released.repvgg_layers(B if "b1" in name else D, channels(model))
    t = write_repopt(released, rows, mode, post_se="se" in name)
    check = same(t, rows, repopt_block(released))
    check(load_checkpoint({"model": t}, model, layout="auto" if mode == "target" else "repopt"))
    if block == "conv_bn":
        check(load_checkpoint(t, network(name, block=block, width=0.125), layout="repopt"))


def scales_of(t):
    return {name: value for name, value in t.items() if "scale_" in name}


def test_scales_file(released, tmp_path):
    """79 scales of RepOpt-VGG-B1, checked against the network they are for."""
    rows = released.repvgg_layers(B, (64, 128, 256, 512, 2048))
    t = write_repopt(released, rows, "csla", False, "meta")
    scales = {name: torch.rand(value.shape) for name, value in scales_of(t).items()}
    assert len(scales) == 79
    torch.save(scales, tmp_path / "RepOpt-VGG-B1-scales.pth")
    with torch.device("meta"):
        target, csla = create_model("repopt_vgg_b1"), create_model("repopt_vgg_b1", block="csla")
    for model in (None, target, csla):
        ours = load_checkpoint(tmp_path / "RepOpt-VGG-B1-scales.pth", model, layout="repopt_scales")
        assert len(ours) == 79
        assert torch.equal(ours["stem.dense_scale"], scales["stage0.scale_conv.weight"]) or model is None
    assert torch.equal(ours["stages.2.3.identity_scale"], scales["stage3.3.scale_identity.weight"])
    whole = load_checkpoint({"model": {**t, **scales}}, target, layout="repopt_scales")
    assert whole.keys() == ours.keys()
    with pytest.raises(ValueError, match="layout='repopt_scales'"):
        load_checkpoint(scales, csla)


def test_scales_of_another_network_are_refused(released):
    rows = released.repvgg_layers(B, (8, 16, 32, 64, 256))
    scales = scales_of(write_repopt(released, rows, "csla", False))
    target = create_model("repopt_vgg_l1", width=0.125)
    with pytest.raises(ValueError, match=r"missing: stages\.0\.4\.dense_scale"):
        load_checkpoint(scales, target, layout="repopt_scales")
    small = create_model("repopt_vgg_b1", width=0.0625)
    with pytest.raises(ValueError, match=r"shape of stages\.0\.0\.dense_scale: \(16,\), the model has \(8,\)"):
        load_checkpoint(scales, small, layout="repopt_scales")
    with pytest.raises(ValueError, match=r"unexpected: stages\.0\.0\.identity_scale"):
        load_checkpoint(
            {**scales, "stage1.0.scale_identity.weight": torch.zeros(16)},
            create_model("repopt_vgg_b1", width=0.125),
            layout="repopt_scales",
        )
