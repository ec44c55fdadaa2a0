"""load_checkpoint: files, wrappers, and everything that is not a checkpoint of the model."""

import pytest
import torch
from safetensors.torch import save_file

from repkern import load_checkpoint, reparameterize
from repkern.nn import OREPABlock, OREPAConv2d, OREPADeepStem


class Evil:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("this ran",))


def net(bias=True):
    return torch.nn.Sequential(OREPABlock(4, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 1, bias=bias))


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": {"model": s}, "epoch": 3}]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes(tmp_path, wrap, prefix):
    source, target = net(), net()
    state = {prefix + name: t for name, t in source.state_dict().items()}
    torch.save(wrap(state), tmp_path / "net.pth")
    assert load_checkpoint(tmp_path / "net.pth", target) is target
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    assert set(load_checkpoint(wrap(state))) == set(source.state_dict())


def test_safetensors(tmp_path):
    source, target = net().eval(), net().eval()
    source[0].bn.running_mean.normal_()
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(load_checkpoint(str(tmp_path / "net.safetensors"), target)(x), source(x))


def test_every_mismatch_is_listed_and_the_model_untouched():
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = {name: t + 1 for name, t in net().state_dict().items()}
    del state["0.conv.origin.weight"], state["2.bias"]
    state["head.weight"] = torch.zeros(2)
    state["0.conv.avg.weight"] = torch.zeros(6, 5)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(state, model)
    for text in (
        "missing: 0.conv.origin.weight",
        "missing: 2.bias",
        "unexpected: head.weight",
        "0.conv.avg.weight: (6, 5), the model has (6, 4)",
    ):
        assert text in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_train_form_file_for_a_deployed_model_is_refused():
    with pytest.raises(
        ValueError, match=r"in training form in the checkpoint and deployed here[^$]*missing: 0\.weight"
    ):
        load_checkpoint(net().state_dict(), reparameterize_quietly(net()))
    with pytest.raises(ValueError, match=r"deployed in the checkpoint and in training form here[^$]*missing: 0\.conv"):
        load_checkpoint(reparameterize_quietly(net()).state_dict(), net())


def reparameterize_quietly(model):
    model[0].bn.running_mean.normal_()
    return reparameterize(model.eval())


def test_a_deployed_state_dict_loads_into_the_deployed_model():
    plain, other = reparameterize_quietly(net()), reparameterize_quietly(net())
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(load_checkpoint(plain.state_dict(), other)(x), plain(x))


def test_files_that_are_no_checkpoints(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save(net().state_dict(), whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not a checkpoint\n" * 50)
    (tmp_path / "text.safetensors").write_text("not a checkpoint\n" * 50)
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({}, tmp_path / "nothing.pth")
    torch.save({"weight": torch.ones(1), "name": "x"}, tmp_path / "mixed.pth")
    save_file({"a": torch.ones(3)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-4])
    for file in sorted(tmp_path.iterdir()):
        if file != whole:
            with pytest.raises(ValueError, match=file.name):
                load_checkpoint(file)


def test_no_code_in_a_file_runs(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"run code \(a print\)"):
        load_checkpoint(tmp_path / "evil.pth")
    assert "this ran" not in capsys.readouterr().out


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_checkpoint(tmp_path / "none.pth")


def test_layout_names():
    with pytest.raises(ValueError, match=r"layout must be one of auto, repkern, .*orepa"):
        load_checkpoint(net().state_dict(), layout="caffe")
    with pytest.raises(ValueError, match="no tensor of layout 'orepa'"):
        load_checkpoint(net().state_dict(), layout="orepa")


def test_an_incomplete_released_block_is_named():
    with pytest.raises(ValueError, match=r"block stage1\.0: 'weight_orepa_.*' is absent"):
        load_checkpoint({"stage1.0.weight_orepa_origin": torch.zeros(4, 4, 3, 3)}, layout="orepa")


def test_a_released_block_of_impossible_shapes_is_named():
    block = OREPABlock(4, 4, 3)
    names = {"avg_conv": (4, 4, 1, 1), "pfir_conv": (4, 4, 1, 1), "1x1": (4, 4, 1, 1), "1x1_kxk_idconv1": (4, 4, 1, 1)}
    names |= {
        "origin": (4, 4, 3, 3),
        "1x1_kxk_conv2": (4, 4, 3, 3),
        "gconv_dw": (32, 1, 3, 3),
        "gconv_pw": (4, 32, 1, 1),
    }
    state = {f"weight_orepa_{name}": torch.zeros(shape) for name, shape in names.items()}
    state |= {"vector": torch.ones(6, 4), "weight_orepa_avg_avg": torch.ones(3, 3), "id_tensor": torch.eye(7)}
    state |= {"weight_orepa_prior": torch.ones(4, 3, 3)}
    with pytest.raises(ValueError, match=r"block stage1\.0: its tensors do not fit"):
        load_checkpoint({f"stage1.0.{name}": tensor for name, tensor in state.items()}, block)
    state["id_tensor"], state["weight_orepa_avg_avg"] = torch.eye(4), torch.arange(9.0).view(3, 3)
    with pytest.raises(ValueError, match=r"block \(root\): .* must be constant"):
        load_checkpoint(state, block)


def test_a_deep_stem_in_float32_keeps_the_default_prior_filters():
    """Its factors are flipped, and so are their prior filters: up to a sign the same ones, which the 1x1 takes."""
    torch.manual_seed(0)
    ours = OREPAConv2d(4, 6, 3, bias=False)
    k = 3
    released = {
        "weight_orepa_origin": ours.origin.weight,
        "weight_orepa_avg_conv": ours.avg.weight[:, :, None, None],
        "weight_orepa_pfir_conv": ours.prior.weight[:, :, None, None],
        "weight_orepa_1x1": ours.pointwise.weight[:, :, None, None],
        "weight_orepa_1x1_kxk_idconv1": ours.reduce.weight[:, :, None, None],
        "weight_orepa_1x1_kxk_conv2": ours.expand.weight,
        "weight_orepa_gconv_dw": ours.depthwise.weight[:, None],
        "weight_orepa_gconv_pw": ours.project.weight[:, :, None, None],
        "vector": ours._scale_rows(),
        "weight_orepa_avg_avg": torch.full((k, k), 1 / 9),
        "weight_orepa_prior": ours.prior_filter,
        "id_tensor": torch.eye(4)[:, :, None, None],
    }
    second = {name: t for name, t in released.items()}
    second["weight_orepa_origin"] = torch.randn(6, 4, 3, 3)
    state = {f"stem.weight0.{name}": t.detach() for name, t in released.items()}
    state |= {f"stem.weight1.{name}": t.detach() for name, t in second.items()}
    converted = load_checkpoint(state)
    assert not any("prior_filter" in name for name in converted)
    factor = OREPAConv2d(4, 6, 3, bias=False)
    factor.load_state_dict({name.removeprefix("stem.factors.1."): t for name, t in converted.items() if ".1." in name})
    ours.origin.weight.data.copy_(second["weight_orepa_origin"])
    torch.testing.assert_close(factor.squeezed_kernel(), ours.squeezed_kernel().flip(-2, -1), rtol=1e-5, atol=1e-6)


def test_prior_filters_other_than_the_papers_travel_in_the_state_dict():
    source, target = OREPAConv2d(3, 5, 3), OREPAConv2d(3, 5, 3)
    assert "prior_filter" not in source.state_dict()
    default = source.prior_filter.clone()
    source.set_prior_filter(torch.randn(5, 3, 3))
    source.scale.weight.data.fill_(1)
    load_checkpoint(source.state_dict(), target)
    assert torch.equal(target.squeezed_kernel(), source.squeezed_kernel())
    assert "prior_filter" in target.state_dict()
    load_checkpoint(OREPAConv2d(3, 5, 3).state_dict(), target)
    assert torch.equal(target.prior_filter, default)
    assert "prior_filter" not in target.state_dict()


def test_deep_stem_names_are_ours_too():
    stem = OREPADeepStem(3, 4, 5, factors="plain")
    released = {"weight0": torch.randn(4, 3, 3, 3), "weight1": torch.randn(4, 4, 3, 3)}
    released |= {f"bn.{name}": t for name, t in stem.bn.state_dict().items()}
    load_checkpoint(released, stem)
    assert torch.equal(stem.factors[0].weight, released["weight0"])
    assert torch.equal(stem.factors[1].weight, released["weight1"].flip(-2, -1))
