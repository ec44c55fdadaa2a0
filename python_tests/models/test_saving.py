"""Files of our own: what comes back is what was written, or an error says why not."""

import copy
import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import repkern
from repkern.models import create_model, load, save
from repkern.models.files import replaced
from repkern.models.saving import describe, read_description
from repkern.nn import DyRepBlock, OREPABlock, RepBlock


def small(name="repvgg_a0", **options):
    """A narrow network whose statistics are not the initial ones."""
    model = create_model(name, num_classes=5, **{"width": 0.25, **options}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(1)
    return model.requires_grad_(False)


def assert_same(model, other, x=None):
    x = torch.randn(2, 3, 32, 32) if x is None else x
    assert not other.training
    assert list(model.state_dict()) == list(other.state_dict())
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    ("name", "block"),
    [("repvgg_a0", "repvgg"), ("resnet18", "dbb"), ("vgg16_cifar", "orepa"), ("repghostnet_050", None)],
)
def test_both_forms_come_back_as_they_were(tmp_path, name, block, suffix):
    path = tmp_path / f"model.{suffix}"
    model = small(name, block=block)
    save(model, path)
    back = load(path)
    assert type(back) is type(model)
    assert (back.model_name, back.block, back.config) == (model.model_name, model.block, model.config)
    assert_same(model, back)
    assert read_description(path)["form"] == "training"
    plain = repkern.reparameterize(model)
    save(plain, path)
    back = load(path)
    assert_same(plain, back)
    assert read_description(path)["form"] == "deployed"
    assert not any(isinstance(module, RepBlock) for module in back.modules())
    other = create_model(name, block="plain", num_classes=5, width=0.25).eval()
    assert_same(plain, repkern.load_checkpoint(path, other))


def test_options_of_every_kind_come_back(tmp_path):
    model = small(
        block="dbb", block_options={"internal_channels": 8}, in_chans=4, output_stride=16, features_only=True,
        out_indices=(1, -1), recompute="cheap",
    )  # fmt: skip
    for form in (model, repkern.reparameterize(model)):
        save(form, tmp_path / "model.safetensors")
        back = load(tmp_path / "model.safetensors")
        assert back.feature_info == model.feature_info
        x = torch.randn(2, 4, 32, 32)
        assert all(torch.equal(a, b) for a, b in zip(form(x), back(x), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_stay(tmp_path, dtype):
    model = small(block="orepa").to(dtype)
    save(model, tmp_path / "model.safetensors")
    back = load(tmp_path / "model.safetensors")
    constants = [name for name, _ in back.named_buffers() if name.endswith("prior_filter")]  # at least float32
    kept = [tensor for name, tensor in [*back.named_parameters(), *back.named_buffers()] if name not in constants]
    assert {tensor.dtype for tensor in kept} == {dtype, torch.int64}
    assert_same(model, back, torch.randn(1, 3, 32, 32, dtype=dtype))


def test_mixed_dtypes_stay(tmp_path):
    model = small()
    model.head.double()
    save(model, tmp_path / "model.safetensors")
    back = load(tmp_path / "model.safetensors")
    assert back.head.weight.dtype is torch.float64
    assert back.stem.dense.weight.dtype is torch.float32


def test_replaced_blocks_are_described(tmp_path):
    model = repkern.reparameterize(small())
    picked = lambda name, conv: name in ("stages.0.1.conv", "stages.2.3.conv")  # noqa: E731
    repkern.replace_convs(model, OREPABlock, preserve=True, where=picked)
    model.stages[1][0] = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.Hardswish())
    model.eval()
    save(model, tmp_path / "model.safetensors")
    back = load(tmp_path / "model.safetensors")
    assert isinstance(back.stages[2][3].conv, OREPABlock)
    assert isinstance(back.stages[1][0][1], nn.Hardswish)
    assert_same(model, back)


def test_a_partly_converted_model_keeps_its_form(tmp_path):
    model = small()
    model.stages[0][1] = model.stages[0][1].fuse()
    model.stages[1][1].identity_bn = None
    save(model, tmp_path / "model.pth")
    assert set(describe(model)["changes"]) == {"stages.0.1", "stages.1.1.identity_bn"}
    assert_same(model, load(tmp_path / "model.pth"))


def test_dyrep_blocks_that_grew_nested_and_were_cut_come_back(tmp_path):
    model = small(block="dyrep", block_options={"branches": ["kxk", "1x1"]})
    model.stages[0][1].add_branches(["1x1_avg", "id"])
    model.stages[1][1].remove_branches(["1x1"])
    nested = model.stages[1][2]
    nested.dense = DyRepBlock.grow(nested.dense, branches=["kxk", "1x1_kxk"])
    model.stages[2][0] = model.stages[2][0].fuse()
    model.eval()
    save(model, tmp_path / "model.safetensors")
    back = load(tmp_path / "model.safetensors")
    assert back.stages[0][1].branches == ("1x1", "1x1_avg", "kxk", "id")
    assert back.stages[1][1].branches == ("kxk",)
    assert back.stages[1][2].dense.branches == ("1x1_kxk", "kxk")
    assert_same(model, back)


def test_synchronized_norms_are_written_as_norms(tmp_path):
    model = small()
    save(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), tmp_path / "model.safetensors")
    assert read_description(tmp_path / "model.safetensors")["changes"] == {}
    assert_same(model, load(tmp_path / "model.safetensors"))


def test_tied_weights_are_written_twice(tmp_path):
    model = repkern.reparameterize(small())
    model.stages[2][2].conv.weight = model.stages[2][1].conv.weight
    save(model, tmp_path / "model.safetensors")
    assert_same(model, load(tmp_path / "model.safetensors"))


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.stages[0], "0", Own(12, 12, 3)), r"stages\.0\.0 is a .*Own; only classes of"),
        (lambda model: nn.utils.parametrizations.weight_norm(model.head), r"head is a .*ParametrizedLinear"),
        (lambda model: setattr(model, "extra", nn.Linear(1, 1)), "other children than create_model makes"),
        (lambda model: model.head.register_buffer("extra", torch.zeros(1)), "head .* another structure"),
    ],
)
def test_what_cannot_be_described_is_refused_and_nothing_is_written(tmp_path, change, message):
    model = small()
    change(model)
    with pytest.raises(ValueError, match=rf"repvgg_a0 cannot be made again from a description: .*{message}"):
        save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_other_models_and_names_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"only networks of repkern\.create_model.*got Linear"):
        save(nn.Linear(1, 1), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.pth, got 'a\.onnx'"):
        save(small(), tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save(small(), tmp_path / "none" / "a.pth")


def test_the_description_says_what_is_in_the_file(tmp_path):
    model = small(block="acb")
    save(model, tmp_path / "a.safetensors")
    with safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        described = json.loads(file.metadata()["repkern"])
    assert set(described.pop("sha256")) == {"notes", "tensors"}
    assert described == read_description(tmp_path / "a.safetensors") == describe(model)
    assert (described["model_name"], described["block"], described["form"]) == ("repvgg_a0", "acb", "training")
    assert described["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (described["repkern"], described["torch"]) == (repkern.__version__, torch.__version__)
    assert described["config"]["num_classes"] == 5
    save(model, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def rewrite(path, **metadata):
    """The same tensors with other metadata."""
    with safe_open(str(path), framework="pt") as file:
        described = json.loads(file.metadata()["repkern"])
        del described["sha256"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
    save_file(tensors, str(path), metadata={"repkern": json.dumps({**described, **metadata})})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": 2}, "is of format 2"),
        ({"form": "other"}, "form 'other'"),
        ({"config": []}, "metadata 'repkern' is damaged"),
        ({"model_name": "repvgg_z9"}, "there is no model 'repvgg_z9'"),
        ({"config": {"nonsense": 1}}, "no option nonsense"),
        ({"changes": {"head": {"class": "os.system"}}}, r"'os\.system' is no module class of torch.nn or repkern.nn"),
        ({"changes": {"head": {"class": "torch.nn.Module.eval"}}}, "is no module class"),
        ({"changes": {"no.where": {"class": None}}}, r"describes no\.where"),
        ({"changes": {"head": {"class": "torch.nn.Linear", "arguments": {"in_features": 3}}}}, "does not fit"),
    ],
)
def test_damaged_or_foreign_metadata_is_an_error(tmp_path, metadata, message):
    save(small(), tmp_path / "a.safetensors")
    rewrite(tmp_path / "a.safetensors", **metadata)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.safetensors")


def test_files_that_are_not_ours_say_so(tmp_path):
    save_file({"a": torch.zeros(1)}, str(tmp_path / "a.safetensors"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        assert read_description(tmp_path / name) is None
        with pytest.raises(ValueError, match=r"does not say which model.*load_checkpoint"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(tmp_path / "none.safetensors")
    for name in ("cut.safetensors", "cut.pth"):
        save(small(), tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="damaged"):
            load(tmp_path / name)


def test_missing_tensors_are_named(tmp_path):
    model = small()
    save(model, tmp_path / "a.safetensors")
    description = {"repkern": json.dumps(read_description(tmp_path / "a.safetensors"))}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "head.bias"}
    save_file(tensors, str(tmp_path / "a.safetensors"), metadata=description)
    with pytest.raises(ValueError, match=r"does not fit 'repvgg_a0' as this version makes it: (.|\n)*head\.bias"):
        load(tmp_path / "a.safetensors")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail_halfway():
        with replaced(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_halfway()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "old")]
    with replaced(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "new")]
    with pytest.raises(IsADirectoryError, match="is a folder"), replaced(tmp_path):
        pass


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_files_have_usual_permissions_or_keep_theirs(tmp_path):
    before = os.umask(0o027)
    try:
        save(small(), tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    (tmp_path / "a.safetensors").chmod(0o600)
    save(small(), tmp_path / "a.safetensors")
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o600
