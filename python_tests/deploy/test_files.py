"""Opening checkpoint files of any origin, and reparameterizing them."""

import re

import pytest
import torch

from repkern.deploy import Conversion, open_model, reparameterize_file
from repkern.models import create_model, load, save
from repkern.nn import ACBlock, DyRepBlock, RepBlock, RepVGGBlock

CLASSES = 7


def official_repvgg(state):
    """Our names -> those of the released RepVGG code, in training or deployed form."""
    names = (
        (r"^stem\.", "stage0."),
        (r"^stages\.(\d)\.", lambda found: f"stage{int(found[1]) + 1}."),
        (r"\.dense\.", ".rbr_dense.conv."),
        (r"\.dense_bn\.", ".rbr_dense.bn."),
        (r"\.pointwise\.", ".rbr_1x1.conv."),
        (r"\.pointwise_bn\.", ".rbr_1x1.bn."),
        (r"\.identity_bn\.", ".rbr_identity."),
        (r"\.conv\.(weight|bias)$", r".rbr_reparam.\1"),
        (r"^head\.", "linear."),
    )
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in names:
            if not (pattern.startswith(r"\.conv") and "rbr_" in name):
                name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoints that the tests read."""
    torch.manual_seed(0)
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def trained(folder):
    """RepVGG-A0, as ours and in the official layout."""
    model = create_model("repvgg_a0", num_classes=CLASSES).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(1)
    save(model, folder / "ours.safetensors")
    official = {f"module.{name}": tensor for name, tensor in official_repvgg(model.state_dict()).items()}
    assert "module.stage1.1.rbr_identity.weight" in official
    torch.save({"state_dict": official, "epoch": 3}, folder / "train.pth")
    return model.eval()


@pytest.fixture
def x():
    return torch.randn(1, 3, 32, 32)


def test_files_of_ours_need_no_name(trained, folder, x):
    opened = open_model(folder / "ours.safetensors")
    assert (opened.form, opened.layouts, opened.model.training) == ("training", ["repkern"], False)
    assert torch.equal(opened.model(x), trained(x))
    assert open_model(folder / "ours.safetensors", model="repvgg_a0", block="repvgg", num_classes=CLASSES)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "resnet18"}, "model='resnet18', but it holds 'repvgg_a0'"),
        ({"block": "dbb"}, "block='dbb', but it holds 'repvgg'"),
        ({"num_classes": 3, "block": "acb"}, "block='acb', but it holds 'repvgg'; num_classes=3, but it holds 7"),
    ],
)
def test_arguments_that_contradict_the_file_are_errors(trained, folder, asked, message):
    with pytest.raises(ValueError, match=message):
        open_model(folder / "ours.safetensors", **asked)


def test_an_official_file_is_recognized_with_its_classes(trained, folder, x):
    opened = open_model(folder / "train.pth", model="repvgg_a0")
    assert (opened.form, opened.layouts) == ("training", ["repvgg"])
    assert opened.model.config["num_classes"] == CLASSES
    assert torch.equal(opened.model(x), trained(x))


def test_a_whole_way_from_an_official_file(trained, folder, x, tmp_path):
    steps = []
    done = reparameterize_file(
        folder / "train.pth", tmp_path / "plain.safetensors", model="repvgg_a0", image_size=32, say=steps.append
    )
    assert isinstance(done, Conversion)
    assert [step.split()[0] for step in steps] == ["reading", "converting,", "writing"]
    plain = load(tmp_path / "plain.safetensors").requires_grad_(False)
    assert not any(isinstance(module, RepBlock) for module in plain.modules())
    wanted = trained(x)
    assert float((plain(x) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    counts = tuple(sum(p.numel() for p in model.parameters()) for model in (trained, plain))
    assert done.parameters == counts
    assert done.size_bytes[1] == (tmp_path / "plain.safetensors").stat().st_size
    assert set(done.report.converted.values()) == {RepVGGBlock.__name__}
    assert done.report.worst_output.within_bound
    # The same in the official deployed layout: what people publish as RepVGG-A0-deploy.
    torch.save(official_repvgg(plain.state_dict()), tmp_path / "deploy.pth")
    for block in (None, "repvgg"):
        opened = open_model(tmp_path / "deploy.pth", model="repvgg_a0", block=block)
        assert (opened.form, opened.model.block) == ("deployed", "plain")
        assert torch.equal(opened.model(x), plain(x))
    again = reparameterize_file(tmp_path / "plain.safetensors", tmp_path / "again.pth", image_size=None)
    assert again.report.converted == {}
    assert again.parameters == (counts[1], counts[1])
    assert torch.equal(load(tmp_path / "again.pth")(x), plain(x))


def test_the_kind_of_block_is_found(tmp_path, x):
    model = create_model("mobilenet_v1", block="acb", num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    opened = open_model(tmp_path / "a.pth", model="mobilenet_v1")
    assert opened.model.block == "acb"
    assert isinstance(opened.model.stem, ACBlock)
    assert torch.equal(opened.model(x), model(x))


def official_dyrep(state):
    """Our names -> those of DyRep's code around a ResNet."""
    names = (
        (r"^stem\.conv\.", "conv1."),
        (r"^stem\.bn\.", "bn1."),
        (r"^head\.", "fc."),
        (r"^stages\.(\d)\.", lambda found: f"layer{int(found[1]) + 1}."),
        (r"shortcut\.conv\.", "downsample.0."),
        (r"shortcut\.bn\.", "downsample.1."),
        (r"conv(\d)\.conv\.", r"conv\1."),
        (r"conv(\d)\.bn\.", r"bn\1."),
        (r"\bdense\.", "dbb_kxk.conv."),
        (r"\bdense_bn\.", "dbb_kxk.bn."),
        (r"\bpointwise\.", "dbb_1x1.conv."),
        (r"\bpointwise_bn\.", "dbb_1x1.bn."),
    )
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


def test_branches_that_dyrep_grew_and_nested_come_along(tmp_path, x):
    model = create_model("resnet18", num_classes=CLASSES).eval().requires_grad_(False)
    grown = model.stages[0][0].conv1
    grown.conv = DyRepBlock.grow(grown.conv, branches=["kxk", "1x1"]).eval()
    grown.conv.dense = DyRepBlock.grow(grown.conv.dense, branches=["kxk", "1x1"]).eval()
    torch.save({"model": official_dyrep(model.state_dict())}, tmp_path / "dyrep.pth")
    opened = open_model(tmp_path / "dyrep.pth", model="resnet18")
    assert "dyrep" in opened.layouts
    assert opened.model.stages[0][0].conv1.conv.dense.branches == ("1x1", "kxk")
    assert torch.equal(opened.model(x), model(x))
    save(opened.model, tmp_path / "ours.safetensors")
    assert torch.equal(load(tmp_path / "ours.safetensors")(x), model(x))


def test_what_fits_no_block_says_what_is_closest_in_few_lines(trained, folder):
    with pytest.raises(
        ValueError, match=r"fits repvgg_a1 with none of the blocks repvgg, plain, .*Closest is"
    ) as problem:
        open_model(folder / "train.pth", model="repvgg_a1")
    lines = str(problem.value).splitlines()
    assert len(lines) <= 14
    assert "shape of " in lines[2]
    assert re.fullmatch(r" +\.\.\. and \d+ more", lines[-1])
    with pytest.raises(ValueError, match="none of the blocks dbb, plain"):
        open_model(folder / "train.pth", model="repvgg_a0", block="dbb")


def test_a_file_without_a_name_and_absent_ones_are_errors(trained, folder):
    with pytest.raises(ValueError, match=r"does not say which network.*repkern\.list_models"):
        open_model(folder / "train.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        open_model(folder / "none.pth")


def test_a_failed_comparison_writes_nothing(trained, folder, tmp_path, monkeypatch):
    fuse = RepVGGBlock.fuse

    def wrong(self):
        plain = fuse(self)
        plain.conv.weight.data.mul_(1.01)
        return plain

    monkeypatch.setattr(RepVGGBlock, "fuse", wrong)
    with pytest.raises(ValueError, match=r"the first block that differs is stem \(RepVGGBlock\)"):
        reparameterize_file(folder / "ours.safetensors", tmp_path / "plain.pth", image_size=32)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.pth, got 'plain\.bin'"):
        reparameterize_file(folder / "ours.safetensors", tmp_path / "plain.bin")


def test_a_file_of_another_network_is_said_to_be_one(trained, folder):
    with pytest.raises(ValueError, match=r"most names of its 351 tensors .* are those of another network"):
        open_model(folder / "train.pth", model="resnet18")
