"""MobileOne (apple's and timm's names), RepGhostNet (released, timm) and RepNAS's supernet of RepVGG's shape."""

import pytest
import torch
from torch.nn import functional

from repkern import load_checkpoint
from repkern.models import create_model
from repkern.models.checkpoints import LoadReport
from repkern.testing import assert_close

APPLE_SE = ("reduce", "expand")


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


def network(name, **options):
    return create_model(name, num_classes=5, **options).double().eval()


# --- MobileOne: stages of a depthwise and a 1x1 block in turn


def mobileone_rows(widths):
    """(prefix, Ci, Co, stride, groups, K, SE) of every block of s4, the variant with squeeze-excite."""
    rows, before = [("stage0.", 3, widths[0], 2, 1, 3, False)], widths[0]
    for stage, (units, excited) in enumerate(((2, 0), (8, 0), (10, 5), (1, 1)), start=1):
        for at in range(units):
            se, co = at >= units - excited, widths[stage]
            rows.append((f"stage{stage}.{2 * at}.", before, before, 2 if at == 0 else 1, before, 3, se))
            rows.append((f"stage{stage}.{2 * at + 1}.", before, co, 1, 1, 1, se))
            before = co
    return rows


def write_mobileone(released, rows, branches):
    t = released.Tensors()
    for p, ci, co, stride, groups, k, se in rows:
        if se:
            t.excite(f"{p}se", co, max(1, co // 16), APPLE_SE)
        if ci == co and stride == 1:
            t.norm(f"{p}rbr_skip", co)
        for at in range(1 if p == "stage0." else branches):
            t.conv_norm(f"{p}rbr_conv.{at}.", co, ci, k, groups)
        if k > 1:
            t.conv_norm(f"{p}rbr_scale.", co, ci, 1, groups)
    t.linear("linear", 5, rows[-1][2])
    return t


def run_mobileone(r, t, rows, x):
    for p, _, _, stride, groups, k, se in rows:
        y, at = 0, 0
        while f"{p}rbr_conv.{at}.conv.weight" in t:
            y = y + r.norm(t, r.conv(t, x, f"{p}rbr_conv.{at}.conv", stride, k // 2, groups), f"{p}rbr_conv.{at}.bn")
            at += 1
        if f"{p}rbr_scale.conv.weight" in t:
            y = y + r.norm(t, r.conv(t, x, f"{p}rbr_scale.conv", stride, 0, groups), f"{p}rbr_scale.bn")
        if f"{p}rbr_skip.weight" in t:
            y = y + r.norm(t, x, f"{p}rbr_skip")
        x = functional.relu(r.excited(t, y, f"{p}se", APPLE_SE) if se else y)
    return r.pooled(t, x, "linear")


TIMM = [(f"stage{at}.", f"stages.{at - 1}.") for at in range(1, 5)] + [
    ("stage0.", "stem."),
    ("rbr_conv", "conv_kxk"),
    ("rbr_scale", "conv_scale"),
    ("rbr_skip", "identity"),
    ("se.reduce", "attn.fc1"),
    ("se.expand", "attn.fc2"),
    ("linear.", "head.fc."),
]


@pytest.mark.parametrize("name", ["mobileone_s4", "mobileone_s0"])
def test_mobileone(released, x, name):
    model = network(name, width=0.125)
    rows = mobileone_rows([feature.channels for feature in model.feature_info])
    if name == "mobileone_s0":
        rows = [(*row[:-1], False) for row in rows]
    t = write_mobileone(released, rows, 4 if name == "mobileone_s0" else 1)
    expected, bound = released.uncertainty(lambda images: run_mobileone(released, t, rows, images), x)
    assert_close(load_checkpoint(t, model)(x), expected, bound, "output")
    timm = released.renamed(t, TIMM)
    # timm has one list of branches where there are several, as apple has it everywhere.
    assert "stages.1.3.conv_kxk.0.bn.running_mean" in timm
    report = LoadReport()
    assert_close(load_checkpoint(timm, network(name, width=0.125), report=report)(x), expected, bound, "timm's names")
    assert report.layouts == ["timm"]


# --- RepGhostNet 0.5x


def divisible(channels):
    rounded = max(4, int(channels + 2) // 4 * 4)
    return rounded + 4 if rounded < 0.9 * channels else rounded


ROWS = [
    [(3, 8, 16, 0, 1)],
    [(3, 24, 24, 0, 2)],
    [(3, 36, 24, 0, 1)],
    [(5, 36, 40, 1, 2)],
    [(5, 60, 40, 1, 1)],
    [(3, 120, 80, 0, 2)],
    [(3, 100, 80, 0, 1), (3, 120, 80, 0, 1), (3, 120, 80, 0, 1), (3, 240, 112, 1, 1), (3, 336, 112, 1, 1)],
    [(5, 336, 160, 1, 2)],
    [(5, 480, 160, 0, 1), (5, 480, 160, 1, 1), (5, 480, 160, 0, 1), (5, 480, 160, 1, 1)],
]


def write_ghost(t, p, ci, co, fusion):
    t.conv_norm(f"{p}primary_conv.", co, ci, 1, conv="0", norm="1")
    t.conv_norm(f"{p}cheap_operation.", co, co, 3, co, conv="0", norm="1")
    if fusion:
        t.norm(f"{p}fusion_bn.0", co)


def ghost(r, t, x, p, relu):
    act = functional.relu if relu else lambda y: y
    y = act(r.norm(t, r.conv(t, x, f"{p}primary_conv.0"), f"{p}primary_conv.1"))
    if f"{p}cheap_operation.bias" in t:
        return act(r.conv(t, y, f"{p}cheap_operation", padding=1, groups=y.shape[1]))
    z = r.norm(t, r.conv(t, y, f"{p}cheap_operation.0", padding=1, groups=y.shape[1]), f"{p}cheap_operation.1")
    return act(z + r.norm(t, y, f"{p}fusion_bn.0") if f"{p}fusion_bn.0.bias" in t else z)


def write_repghost(released, fusion=True):
    t, before = released.Tensors(), divisible(8)
    t.conv_norm("", before, 3, 3, conv="conv_stem", norm="bn1")
    for group, rows in enumerate(ROWS):
        for at, (k, inner, co, se, stride) in enumerate(rows):
            p, inner, co = f"blocks.{group}.{at}.", divisible(inner / 2), divisible(co / 2)
            write_ghost(t, f"{p}ghost1.", before, inner, fusion)
            if stride > 1:
                t.conv_norm(p, inner, inner, k, inner, conv="conv_dw", norm="bn_dw")
            if se:
                t.excite(f"{p}se", inner, divisible(inner / 4), ("conv_reduce", "conv_expand"))
            write_ghost(t, f"{p}ghost2.", inner, co, fusion)
            if stride > 1 or before != co:
                t.conv_norm(f"{p}shortcut.", before, before, k, before, conv="0", norm="1")
                t.conv_norm(f"{p}shortcut.", co, before, 1, conv="2", norm="3")
            before = co
    t.conv_norm("blocks.9.0.", divisible(480), before, 1, norm="bn1")
    t.conv("conv_head", 1280, divisible(480), 1, bias=True)
    t.linear("classifier", 5, 1280)
    return t


def run_repghost(r, t, x):
    def hard(y):
        return functional.relu6(y + 3) / 6

    x = functional.relu(r.norm(t, r.conv(t, x, "conv_stem", 2, 1), "bn1"))
    for group, rows in enumerate(ROWS):
        for at, (k, _, _, se, stride) in enumerate(rows):
            p = f"blocks.{group}.{at}."
            y = ghost(r, t, x, f"{p}ghost1.", True)
            if stride > 1:
                y = r.norm(t, r.conv(t, y, f"{p}conv_dw", stride, k // 2, y.shape[1]), f"{p}bn_dw")
            y = r.excited(t, y, f"{p}se", ("conv_reduce", "conv_expand"), hard) if se else y
            y = ghost(r, t, y, f"{p}ghost2.", False)
            if f"{p}shortcut.0.weight" in t:
                x = r.norm(t, r.conv(t, x, f"{p}shortcut.0", stride, k // 2, x.shape[1]), f"{p}shortcut.1")
                x = r.norm(t, r.conv(t, x, f"{p}shortcut.2"), f"{p}shortcut.3")
            x = x + y
    x = functional.relu(r.norm(t, r.conv(t, x, "blocks.9.0.conv"), "blocks.9.0.bn1"))
    x = functional.relu(r.conv(t, x.mean((2, 3), keepdim=True), "conv_head"))
    return r.pooled(t, x, "classifier")


def deploy_repghost(released, t):
    """The released switch_to_deploy: only the depthwise halves are folded, all other norms stay."""
    out = released.Tensors()
    for name, value in t.items():
        p, mark, _ = name.partition("cheap_operation.0.weight")
        if mark:
            kernel, bias = released.folded(t, f"{p}cheap_operation.0", f"{p}cheap_operation.1")
            factor, shift = released.scale_and_shift(t, f"{p}fusion_bn.0")
            kernel = kernel + functional.pad(factor[:, None, None, None], (1, 1, 1, 1))
            out[f"{p}cheap_operation.weight"], out[f"{p}cheap_operation.bias"] = kernel, bias + shift
        elif "cheap_operation" not in name and "fusion_bn" not in name:
            out[name] = value
    return out


def test_repghostnet(released, x):
    t = write_repghost(released)
    expected, bound = released.uncertainty(lambda images: run_repghost(released, t, images), x)
    assert_close(load_checkpoint(t, network("repghostnet_050"))(x), expected, bound, "output")
    deployed = deploy_repghost(released, t)
    assert_close(run_repghost(released, deployed, x), expected, bound, "released deployed form")
    plain = network("repghostnet_050", block="plain")
    assert_close(load_checkpoint(deployed, plain)(x), expected, bound, "plain model, every norm folded")
    with pytest.raises(ValueError, match="deployed in the checkpoint and in training form here"):
        load_checkpoint(deployed, network("repghostnet_050"))


def test_repghostnet_without_fusion(released, x):
    t = write_repghost(released, fusion=False)
    expected, bound = released.uncertainty(lambda images: run_repghost(released, t, images), x)
    model = network("repghostnet_050", block_options={"norm_identity": False})
    assert_close(load_checkpoint(t, model, layout="repghost")(x), expected, bound, "output")


def test_scales_of_repoptghostnet(released):
    """64 scales: two for each ghost module, which has no 1x1 beside its depthwise convolution."""
    t = write_repghost(released)
    scales = {}
    for name, value in t.items():
        p, mark, _ = name.partition("cheap_operation.0.weight")
        if mark:
            scales[f"{p}cheap_operation.1.weight"] = torch.rand(len(value))
            scales[f"{p}fusion_scale.weight"] = torch.rand(len(value))
    assert len(scales) == 64
    target = create_model("repghostnet_050", block="conv_bn")
    ours = load_checkpoint(scales, target, layout="repopt_scales")
    assert len(ours) == 64
    assert torch.equal(ours["stages.6.3.ghost2.fusion.identity_scale"], scales["blocks.6.3.ghost2.fusion_scale.weight"])
    del scales["blocks.0.0.ghost1.fusion_scale.weight"], scales["blocks.0.0.ghost1.cheap_operation.1.weight"]
    with pytest.raises(ValueError, match=r"missing: stages\.0\.0\.ghost1\.fusion\.dense_scale"):
        load_checkpoint(scales, target, layout="repopt_scales")


# --- RepNAS: `features` in one list, its stages begin where there is no skip


def write_repnas(released, rows):
    t = released.Tensors()
    for at, (_, ci, co, stride, _) in enumerate(rows):
        p = f"features.{at}."
        t.conv_norm(f"{p}conv.", co, ci, 3)
        if stride == 1:
            t.norm(f"{p}skip_connect.bn", co)
        t.conv_norm(f"{p}_ops.0.", co, ci, 1)
        t.conv(f"{p}_ops.1.conv1.conv", co, ci, 1)
        t.norm(f"{p}_ops.1.conv1.bn.bn", co)
        t.norm(f"{p}_ops.1.bn2", co)
        t.conv_norm(f"{p}_ops.2.", co, ci, 3)
        if stride == 1:
            t.normal(f"{p}_ops.3.conv1.weight", ci, ci, 1, 1, scale=0.1)
            t.norm(f"{p}_ops.3.bn1.bn", ci)
        t.conv_norm(f"{p}_ops.3.conv2.", co, ci, 3)
        t.conv_norm(f"{p}_ops.4.", co, ci, (1, 3))
        t.conv_norm(f"{p}_ops.5.", co, ci, (3, 1))
    t.normal("alphas", len(rows), 6)
    t.linear("linear", 5, rows[-1][2])
    return t


def run_repnas(r, t, rows, x):
    def bordered(y, name):
        _, shift = r.scale_and_shift(t, name)
        return functional.pad(r.norm(t, y, name) - shift[:, None, None], (1, 1, 1, 1)) + shift[:, None, None]

    for at, (_, _, _, stride, _) in enumerate(rows):
        p = f"features.{at}."
        ops = [f"{p}_ops.{number}." for number in range(6)]
        y = r.norm(t, r.conv(t, x, f"{ops[0]}conv", stride), f"{ops[0]}bn")
        mean = bordered(r.conv(t, x, f"{ops[1]}conv1.conv"), f"{ops[1]}conv1.bn.bn")
        y = y + r.norm(t, functional.avg_pool2d(mean, 3, stride), f"{ops[1]}bn2")
        y = y + r.norm(t, r.conv(t, x, f"{ops[2]}conv", stride, 1), f"{ops[2]}bn")
        if stride == 1:
            y = y + r.norm(t, x, f"{p}skip_connect.bn")
            inner = bordered(x + r.conv(t, x, f"{ops[3]}conv1"), f"{ops[3]}bn1.bn")
            y = y + r.norm(t, r.conv(t, inner, f"{ops[3]}conv2.conv"), f"{ops[3]}conv2.bn")
        else:
            y = y + r.norm(t, r.conv(t, x, f"{ops[3]}conv2.conv", stride, 1), f"{ops[3]}conv2.bn")
        y = y + r.norm(t, r.conv(t, x, f"{ops[4]}conv", stride, (0, 1)), f"{ops[4]}bn")
        y = y + r.norm(t, r.conv(t, x, f"{ops[5]}conv", stride, (1, 0)), f"{ops[5]}bn")
        x = functional.relu(y)
    return r.pooled(t, x, "linear")


def test_repnas_supernet(released, x):
    options = {"block": "odbb", "width": 0.125, "block_options": {"strided_reduce": False}}
    model = network("repvgg_a0", **options)
    rows = released.repvgg_layers((2, 4, 14, 1), [feature.channels for feature in model.feature_info])
    t = write_repnas(released, rows)
    expected, bound = released.uncertainty(lambda images: run_repnas(released, t, rows, images), x)
    report = LoadReport()
    file = {"model": t, "epoch": 15, "fixed_path": None, "optimizer": {}, "arch_optimizer": {}}
    assert_close(load_checkpoint(file, model, report=report)(x), expected, bound, "output")
    assert "alphas" in report.left_out
    assert sum(".conv." in name for name in report.left_out) == 22 * 6
    assert report.beside == ["arch_optimizer", "epoch", "fixed_path", "optimizer"]


def test_repnas_subnet(released, x):
    """Numbers of branches say nothing there, since those that were not chosen are missing in between."""
    options = {"block": "odbb", "width": 0.125, "block_options": {"branches": ("kxk", "kx1")}}
    model = network("repvgg_a0", **options)
    rows = released.repvgg_layers((2, 4, 14, 1), [feature.channels for feature in model.feature_info])
    whole = write_repnas(released, rows)
    t = {name: value for name, value in whole.items() if not any(f"_ops.{at}." in name for at in (0, 1, 3, 4))}
    t = {name: value for name, value in t.items() if "skip_connect" not in name and name != "alphas"}
    t = released.renamed(t, [("_ops.2.", "_ops.0."), ("_ops.5.", "_ops.1.")])

    def run(images):
        for at, (_, _, _, stride, _) in enumerate(rows):
            p = f"features.{at}."
            y = released.norm(t, released.conv(t, images, f"{p}_ops.0.conv", stride, 1), f"{p}_ops.0.bn")
            z = released.conv(t, images, f"{p}_ops.1.conv", stride, (1, 0))
            images = functional.relu(y + released.norm(t, z, f"{p}_ops.1.bn"))
        return released.pooled(t, images, "linear")

    expected, bound = released.uncertainty(run, x)
    assert_close(load_checkpoint(t, model)(x), expected, bound, "output")


def test_repnas_fused(released, x):
    plain = network("repvgg_a0", block="plain", width=0.125)
    rows = released.repvgg_layers((2, 4, 14, 1), [feature.channels for feature in plain.feature_info])
    t = released.Tensors()
    for at, (_, ci, co, _, _) in enumerate(rows):
        t.conv(f"features.{at}.conv", co, ci, 3, bias=True)
    t.linear("linear", 5, rows[-1][2])

    def run(images):
        for at, (_, _, _, stride, _) in enumerate(rows):
            images = functional.relu(released.conv(t, images, f"features.{at}.conv", stride, 1))
        return released.pooled(t, images, "linear")

    expected, bound = released.uncertainty(run, x)
    assert_close(load_checkpoint(t, plain)(x), expected, bound, "output")
