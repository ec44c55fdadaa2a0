"""HyperSearch: the search model of any network, its scales, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from repkern import create_model
from repkern.models.digits import DigitsNet
from repkern.models.saving import load, save
from repkern.nn import CSLABlock, CSLAConv2d
from repkern.optim import from_scales
from repkern.search import HyperSearch


def firsts(search):
    return {name: round(scale[0].item(), 3) for name, scale in search.scales().items()}


def sequential():
    """No tracing needed, and one layer of each kind that is not chosen."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 5, padding=2), nn.BatchNorm2d(4),
    )  # fmt: skip


def test_scales_of_repopt_vgg():
    """Paper, Sec. 4.1, and Appendix B with the released code, which are one layer apart."""
    model = create_model("repopt_vgg_b1", width=0.0625, num_classes=5)
    paper, released = HyperSearch(model), HyperSearch(model, initial="released")
    assert len(paper.scales()) == 79
    wanted = {"paper": [1.414, 1.0, 0.816, 0.707], "released": [1.0, 1.414, 1.0, 0.816]}
    for search, values in ((paper, wanted["paper"]), (released, wanted["released"])):
        found = firsts(search)
        for part in ("dense_scale", "pointwise_scale"):
            assert [found[f"stages.0.{at}.{part}"] for at in range(4)] == values
            assert found[f"stem.{part}"] == found[f"stages.3.0.{part}"] == values[0]
        assert [found.get(f"stages.0.{at}.identity_scale") for at in range(4)] == [None, 1, 1, 1]
    assert firsts(HyperSearch(model, initial="ones"))["stages.2.5.dense_scale"] == 1
    assert firsts(HyperSearch(model, initial=0.5))["stages.2.5.pointwise_scale"] == 0.5


def test_the_search_model_is_that_of_the_csla_blocks(tmp_path):
    """Built from conv + BN or from "csla", it has the same names, and is written and read as any network."""
    torch.manual_seed(0)
    target = create_model("repopt_vgg_b1", width=0.0625, num_classes=5)
    built = HyperSearch(target)
    ready = HyperSearch(create_model("repopt_vgg_b1", width=0.0625, num_classes=5, block="csla"))
    assert built.layers == ready.layers
    assert set(built.model.state_dict()) == set(ready.model.state_dict())
    assert {n for n, p in built.model.named_parameters() if p.requires_grad} == {
        n for n, _ in ready.model.named_parameters()
    }
    save(built.model, tmp_path / "search.safetensors")
    again = load(tmp_path / "search.safetensors")
    assert HyperSearch(again, initial=built.scales()).layers == built.layers


def test_the_network_around_stays():
    torch.manual_seed(0)
    model = DigitsNet((4, 8), 1).eval()
    model.stem[0].register_forward_hook(lambda *args: None)
    weights = copy.deepcopy(model.state_dict())
    search = HyperSearch(model)
    assert not any(isinstance(module, CSLABlock) for module in model.modules())
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    blocks = {name: m for name, m in search.model.named_modules() if isinstance(m, CSLABlock)}
    assert tuple(blocks) == search.layers
    for name, block in blocks.items():
        conv = model.get_submodule(name)
        assert isinstance(block, CSLAConv2d)
        assert torch.equal(block.dense.weight, conv.weight)
        assert block.training is block.dense.training is block.pointwise.training is False
        assert (block.bias is None) == (conv.bias is None)
    assert len(blocks["stem.0"]._forward_hooks) == 1
    x = torch.randn(2, 1, 8, 8)
    expected = model.stages[1].conv2(x := torch.randn(2, 8, 4, 4))
    block = blocks["stages.1.conv2"]
    s = block.dense_scale.weight[:, None, None]
    branches = s * expected + block.pointwise_scale.weight[:, None, None] * block.pointwise(x) + x
    assert torch.allclose(block(x), branches, atol=1e-5)
    assert HyperSearch(model, inplace=True).model is model
    assert isinstance(model.stem[0], CSLABlock)


def test_a_search_with_any_loop():
    """Scales move, are decayed or not by the rule, and train the user's network in the next line."""
    torch.manual_seed(0)
    model = DigitsNet((4, 8), 1)
    search = HyperSearch(model)
    groups = search.parameter_groups(1e-3)
    decayed = {name for name, _ in groups[0]["params"]}
    assert "stages.0.conv1.identity_scale.weight" in decayed
    assert not any(name.endswith(("dense_scale", "pointwise_scale", "norm1.weight")) for name in decayed)
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True)
    start = search.scales()
    for _ in range(2):
        for _ in range(3):
            optimizer.zero_grad()
            images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
            nn.functional.cross_entropy(search.model(images), labels).backward()
            optimizer.step()
            search.step()
        search.epoch_end()
    scales = search.scales()
    assert all(not torch.equal(scale, start[name]) for name, scale in scales.items())
    assert [row["steps"] for row in search.history] == [3, 6]
    assert search.history[1]["stem.0.dense_scale"] == pytest.approx(scales["stem.0.dense_scale"].mean().item())
    assert len(from_scales(model, scales, lr=0.1).grad_mults) == len(search.layers)
    assert all(not scale.requires_grad for scale in scales.values())

    again = HyperSearch(model)
    again.load_state_dict(search.state_dict())
    again.model.load_state_dict(search.model.state_dict())
    assert again.history == search.history
    assert again.state_dict() == search.state_dict()
    assert all(torch.equal(scale, scales[name]) for name, scale in again.scales().items())
    again.step()
    again.epoch_end()
    assert again.history[-1]["steps"] == 7
    with pytest.raises(ValueError, match=r"a search of 5 layers, this one has 1; they differ in"):
        HyperSearch(model, where="stem.0").load_state_dict(search.state_dict())


def test_which_convolutions():
    model = sequential()
    assert HyperSearch(model).layers == ("0", "5")
    assert HyperSearch(model, where="[79]").layers == ("7", "9")
    assert HyperSearch(model, where=["0", "9"]).layers == ("0", "9")
    assert HyperSearch(model, where=lambda name, module: module.kernel_size == (1, 1)).layers == ("3",)
    parts = {name.split(".")[1] for name in HyperSearch(model, where=["5", "9"], pointwise=False).scales()}
    assert parts == {"dense_scale", "identity_scale"}
    assert set(HyperSearch(model, where="9", identity=False).scales()) == {"9.dense_scale", "9.pointwise_scale"}
    assert set(HyperSearch(model, where="3").scales()) == {"3.dense_scale", "3.identity_scale"}
    assert "5.identity_scale" not in HyperSearch(model).scales()  # it has no padding, and pixels move
    assert HyperSearch(nn.Conv2d(3, 3, 3), where="*").layers == ("",)
    model[0].weight.requires_grad_(False)
    assert HyperSearch(model).layers == ("5",)


def test_all_convolutions_of_a_network():
    """1x1 kernels have no 1x1 beside them, which is no mismatch; norms of any kind, or none, may follow."""
    model = sequential()
    search = HyperSearch(model, where=lambda name, module: True)
    optimizer = from_scales(model, search.scales(), lr=0.1)
    assert len(optimizer.grad_mults) == 5
    assert optimizer.grad_mults[model[3].weight].pointwise_scale is None


def test_other_strides_in_the_search():
    """Table 6: the search model keeps more resolution, and its scales are for the published network."""
    target = create_model("repopt_vgg_b1", width=0.0625, num_classes=5)
    model = create_model("repopt_vgg_b1", width=0.0625, num_classes=5, strides=(2, 2, 1, 2, 1))
    assert [feature.reduction for feature in model.feature_info] == [2, 4, 4, 8, 8]
    images = torch.zeros(2, 3, 32, 32)
    assert [m.shape[-1] for m in (model.forward_features(images), target.forward_features(images))] == [4, 1]
    search = HyperSearch(model)
    assert firsts(search) == firsts(HyperSearch(target))
    assert len(from_scales(target, search.scales(), lr=0.1).grad_mults) == 28
    again = create_model(**model.config)
    assert [feature.reduction for feature in again.feature_info] == [2, 4, 4, 8, 8]
    for wrong in ((2, 2), (2, 2, 2, 2, 0), (2, 2, 2, 2, 1.0)):
        with pytest.raises(ValueError, match="strides must be five integers from 1"):
            create_model("repopt_vgg_b1", strides=wrong)


def test_continuing_from_scales():
    model = DigitsNet((4,), 1)
    scales = {name: torch.rand_like(s) + 0.5 for name, s in HyperSearch(model).scales().items()}
    search = HyperSearch(model, initial=scales)
    assert all(torch.equal(scale, scales[name]) for name, scale in search.scales().items())
    del scales["stages.0.conv2.identity_scale"]
    with pytest.raises(
        ValueError, match=r"initial scales and layers differ \(1\), first in stages\.0\.conv2\.identity"
    ):
        HyperSearch(model, initial=scales)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "stages.*"}, r"'stages\.\*' matches no convolution of Sequential; it has 0, 3, 5, 7, 9"),
        ({"where": lambda name, module: False}, "`where` picks none of the 5 convolutions"),
        ({"initial": "two"}, r"initial must be one of paper, released, ones, or a finite number .*, got 'two'"),
        ({"initial": 0.0}, r"or a finite number that is not 0, got 0\.0"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        HyperSearch(sequential(), **options)


def test_models_that_cannot_be():
    with pytest.raises(ValueError, match="Sequential has no trained 3x3 convolution that a BatchNorm follows, among 1"):
        HyperSearch(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    frozen = sequential().requires_grad_(False)
    with pytest.raises(ValueError, match="5 cannot be searched: its weight requires no gradient"):
        HyperSearch(frozen, where="5")
    shared = sequential()
    shared[7].weight = shared[5].weight
    with pytest.raises(ValueError, match="7 cannot be searched: its weight or bias is shared"):
        HyperSearch(shared, where="7")
    with pytest.raises(ValueError, match="use the model before DataParallel wraps it"):
        HyperSearch(nn.DataParallel(sequential()))
    compiled = torch.compile(sequential(), backend="eager")
    assert HyperSearch(compiled).layers == ("0", "5")


def test_representation():
    assert repr(HyperSearch(sequential())) == "HyperSearch(Sequential, 2 layers, 0 epochs)"
