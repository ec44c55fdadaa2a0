"""ResNet-18 by its released names, with the blocks of DBB, ACNet, OREPA and RepVGG; torchvision's names; MobileNet."""

import pytest
import torch
from torch.nn import functional

from repkern import load_checkpoint
from repkern.models import create_model
from repkern.testing import assert_close

UNITS = [(stage, at) for stage in range(1, 5) for at in range(2)]


def bordered(released, t, x, name):
    """The released BNAndPad: the border is what the norm makes of zero."""
    _, shift = released.scale_and_shift(t, f"{name}.bn")
    shift = shift[:, None, None]
    return functional.pad(released.norm(t, x, f"{name}.bn") - shift, (1, 1, 1, 1)) + shift


class Plain:
    kind = "conv_bn"

    @staticmethod
    def write(t, p, co, ci, groups=1):
        t.conv_norm(p, co, ci, 3, groups)

    @staticmethod
    def run(r, t, x, p, stride, groups=1):
        return r.norm(t, r.conv(t, x, f"{p}conv", stride, 1, groups), f"{p}bn")


class DBB:
    kind = "dbb"

    @staticmethod
    def write(t, p, co, ci, groups=1):
        depthwise = groups == co
        t.conv_norm(f"{p}dbb_origin.", co, ci, 3, groups)
        if not depthwise:
            t.conv(f"{p}dbb_avg.conv", co, ci, 1, groups)
            t.norm(f"{p}dbb_avg.bn.bn", co)
            t.conv_norm(f"{p}dbb_1x1.", co, ci, 1, groups)
        t.norm(f"{p}dbb_avg.avgbn", co)
        inner = 2 * ci if depthwise else ci
        if depthwise:
            t.conv(f"{p}dbb_1x1_kxk.conv1", inner, ci, 1, groups)
        else:
            t.normal(f"{p}dbb_1x1_kxk.idconv1.weight", ci, ci, 1, 1, scale=0.1)
        t.norm(f"{p}dbb_1x1_kxk.bn1.bn", inner)
        t.conv(f"{p}dbb_1x1_kxk.conv2", co, inner, 3, groups)
        t.norm(f"{p}dbb_1x1_kxk.bn2", co)

    @staticmethod
    def run(r, t, x, p, stride, groups=1):
        y = r.norm(t, r.conv(t, x, f"{p}dbb_origin.conv", stride, 1, groups), f"{p}dbb_origin.bn")
        if f"{p}dbb_1x1.conv.weight" in t:
            y = y + r.norm(t, r.conv(t, x, f"{p}dbb_1x1.conv", stride, 0, groups), f"{p}dbb_1x1.bn")
            mean = bordered(r, t, r.conv(t, x, f"{p}dbb_avg.conv", groups=groups), f"{p}dbb_avg.bn")
        else:
            mean = functional.pad(x, (1, 1, 1, 1))
        y = y + r.norm(t, functional.avg_pool2d(mean, 3, stride), f"{p}dbb_avg.avgbn")
        if f"{p}dbb_1x1_kxk.conv1.weight" in t:
            inner = r.conv(t, x, f"{p}dbb_1x1_kxk.conv1", groups=groups)
        else:
            inner = x + r.conv(t, x, f"{p}dbb_1x1_kxk.idconv1")
        inner = bordered(r, t, inner, f"{p}dbb_1x1_kxk.bn1")
        return y + r.norm(t, r.conv(t, inner, f"{p}dbb_1x1_kxk.conv2", stride, 0, groups), f"{p}dbb_1x1_kxk.bn2")


class ACB:
    kind = "acb"

    @staticmethod
    def write(t, p, co, ci):
        for name, size in (("square", 3), ("ver", (3, 1)), ("hor", (1, 3))):
            t.conv_norm(p, co, ci, size, conv=f"{name}_conv", norm=f"{name}_bn")

    @staticmethod
    def run(r, t, x, p, stride):
        return sum(
            r.norm(t, r.conv(t, x, f"{p}{name}_conv", stride, padding), f"{p}{name}_bn")
            for name, padding in (("square", 1), ("ver", (1, 0)), ("hor", (0, 1)))
        )


class RepVGG:
    kind = "repvgg"

    @staticmethod
    def write(t, p, co, ci):
        # Whether there is an identity follows from the place: the first convolution of a stage has stride 2.
        stride = 2 if p.endswith(".0.conv1.") and not p.startswith("stage1") else 1
        if ci == co and stride == 1:
            t.norm(f"{p}rbr_identity", co)
        t.conv_norm(f"{p}rbr_dense.", co, ci, 3)
        t.conv_norm(f"{p}rbr_1x1.", co, ci, 1)

    @staticmethod
    def run(r, t, x, p, stride):
        return r.repvgg_sum(t, x, p, stride, 1)


class OREPA:
    kind = "orepa"

    @staticmethod
    def write(t, p, co, ci):
        t.orepa_kernel(f"{p}weight_orepa_", co, ci)
        t.norm(f"{p}bn", co)

    @staticmethod
    def run(r, t, x, p, stride):
        kernel = r.orepa_kernel(t, f"{p}weight_orepa_")
        return r.norm(t, functional.conv2d(x, kernel, None, stride, 1), f"{p}bn")

    @staticmethod
    def write_stem(t, p, co):
        for at, ci in enumerate((3, co, co)):
            t.orepa_kernel(f"{p}weight{at}.weight_orepa_", co, ci)
        t.norm(f"{p}bn", co)

    @staticmethod
    def run_stem(r, t, x, p):
        kernel = r.orepa_kernel(t, f"{p}weight0.weight_orepa_").transpose(0, 1)
        for at in (1, 2):
            kernel = functional.conv2d(kernel, r.orepa_kernel(t, f"{p}weight{at}.weight_orepa_"), padding=2)
        return r.norm(t, functional.conv2d(x, kernel.transpose(0, 1), None, 2, 3), f"{p}bn")


def write_resnet(released, block, widths):
    t = released.Tensors()
    if block is OREPA:
        OREPA.write_stem(t, "stage0.conv1.", widths[0])
    else:
        t.conv_norm("stage0.conv1.", widths[0], 3, 7)
    before = widths[0]
    for stage, at in UNITS:
        p, co = f"stage{stage}.{at}.", widths[stage]
        if at == 0 and (stage > 1 or before != co):
            t.conv_norm(f"{p}shortcut.", co, before, 1)
        block.write(t, f"{p}conv1.", co, before)
        block.write(t, f"{p}conv2.", co, co)
        before = co
    t.linear("linear", 5, before)
    return t


def run_resnet(r, t, x, block):
    if block is OREPA:
        x = OREPA.run_stem(r, t, x, "stage0.conv1.")
    else:
        x = r.norm(t, r.conv(t, x, "stage0.conv1.conv", 2, 3), "stage0.conv1.bn")
    x = functional.max_pool2d(functional.relu(x), 3, 2, 1)
    for stage, at in UNITS:
        p, stride = f"stage{stage}.{at}.", 2 if at == 0 and stage > 1 else 1
        y = functional.relu(block.run(r, t, x, f"{p}conv1.", stride))
        y = block.run(r, t, y, f"{p}conv2.", 1)
        short = f"{p}shortcut.conv"
        x = x if f"{short}.weight" not in t else r.norm(t, r.conv(t, x, short, stride), f"{p}shortcut.bn")
        x = functional.relu(x + y)
    return r.pooled(t, x, "linear")


def narrow(name="resnet18", **options):
    return create_model(name, num_classes=5, width=0.125, **options).double().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 48, 48, dtype=torch.float64)


@pytest.mark.parametrize("block", [Plain, DBB, ACB, RepVGG, OREPA], ids=lambda block: block.kind)
def test_resnet18(released, x, block):
    """With the names that these authors share: stage0.conv1, stageN.i.conv1 and .shortcut, linear."""
    model = narrow(block=block.kind)
    t = write_resnet(released, block, [feature.channels for feature in model.feature_info])
    expected, bound = released.uncertainty(lambda images: run_resnet(released, t, images, block), x)
    load_checkpoint({"state_dict": {f"module.{name}": value for name, value in t.items()}}, model)
    assert_close(model(x), expected, bound, "output")
    bare = create_model("resnet18", num_classes=5, width=0.125, block=block.kind).double().eval()
    bare.load_state_dict(load_checkpoint(t), strict=False)
    assert_close(bare(x), expected, bound, "output through a state_dict")
    with pytest.raises(ValueError, match="in training form in the checkpoint and deployed here"):
        load_checkpoint(t, narrow(block="plain"))


DEPLOYED = {Plain: "conv", DBB: "dbb_reparam", ACB: "fused_conv", RepVGG: "rbr_reparam", OREPA: "orepa_reparam"}


@pytest.mark.parametrize("block", DEPLOYED, ids=lambda block: block.kind)
def test_resnet18_deployed(released, x, block):
    """Every layer one convolution with bias; ours has it in `conv` only where an activation follows."""
    plain = narrow(block="plain")
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    t = released.Tensors()
    for name, value in plain.state_dict().items():
        layer, _, part = (
            name.removesuffix(".weight").removesuffix(".bias").removesuffix(".conv"),
            "",
            name.split(".")[-1],
        )
        if layer == "head":
            t[f"linear.{part}"] = value.clone()
            continue
        conv = DEPLOYED[block] if layer.endswith(("conv1", "conv2")) else "conv"
        if layer == "stem":
            conv, layer = "or_large_reparam" if block is OREPA else "conv", "stage0.conv1"
        layer = layer.replace("stages.3", "stage4").replace("stages.2", "stage3")
        layer = layer.replace("stages.1", "stage2").replace("stages.0", "stage1")
        t[f"{layer}.{conv}.{part}"] = value.clone()
    fresh = load_checkpoint(t, narrow(block="plain"))
    assert torch.equal(fresh(x), plain(x))
    with pytest.raises(ValueError, match=r"deployed in the checkpoint and in training form here.*block=\"plain\""):
        load_checkpoint(t, narrow(block="dbb" if block is Plain else block.kind))


def test_torchvision_names(released, x):
    """conv1, bn1, layer1.0.conv1, downsample.0, fc: plain ResNets, which DyRep trains too."""
    model = narrow()
    t = write_resnet(released, Plain, [feature.channels for feature in model.feature_info])
    expected, bound = released.uncertainty(lambda images: run_resnet(released, t, images, Plain), x)
    names = [("stage0.conv1.conv.", "conv1."), ("stage0.conv1.bn.", "bn1."), ("linear.", "fc.")]
    names += [(f"conv{at}.conv.", f"conv{at}.") for at in (1, 2)] + [(f"conv{at}.bn.", f"bn{at}.") for at in (1, 2)]
    names += [("shortcut.conv.", "downsample.0."), ("shortcut.bn.", "downsample.1."), ("stage", "layer")]
    vision = released.renamed(t, names)
    assert {"layer2.0.downsample.1.running_var", "layer1.1.bn2.bias", "conv1.weight", "fc.bias"} <= vision.keys()
    assert_close(load_checkpoint(vision, model)(x), expected, bound, "output")


def test_mobilenet_with_dbb(released, x):
    """`stem` is the sequence of units there; depthwise layers are DBBs without 1x1 and with an inner width of 2 Ci."""
    model = narrow("mobilenet_v1", block="dbb")
    t = released.Tensors()
    DBB.write(t, "conv1.", 8, 3)
    units, before = [], 8
    for stage in model.stages:
        for at, unit in enumerate(stage):
            channels = unit.pointwise.out_channels
            units.append((f"stem.{len(units)}.", before, 2 if at == 0 and len(units) else 1))
            DBB.write(t, f"{units[-1][0]}depthwise.", before, before, before)
            t.conv_norm(f"{units[-1][0]}pointwise.", channels, before, 1)
            before = channels
    t.linear("linear", 5, before)

    def run(images):
        y = functional.relu(DBB.run(released, t, images, "conv1.", 2))
        for p, groups, stride in units:
            y = functional.relu(DBB.run(released, t, y, f"{p}depthwise.", stride, groups))
            y = released.norm(t, released.conv(t, y, f"{p}pointwise.conv"), f"{p}pointwise.bn")
            y = functional.relu(y)
        return released.pooled(t, y, "linear")

    assert len(units) == 13
    expected, bound = released.uncertainty(run, x)
    assert_close(load_checkpoint(t, model)(x), expected, bound, "output")
