"""Linear layers in optimize_for_inference: the same values, the same state_dict, and what is no row stays torch's."""

import copy
import pickle

import pytest
import torch
from torch import nn

import repkern
from repkern.deploy import InferenceConv2d
from repkern.deploy.inference_linear import InferenceLinear


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REPKERN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def model(randomize):
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 37), nn.Hardswish(), nn.Linear(37, 5, bias=False),
        )
    )  # fmt: skip


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


X = torch.randn(3, 3, 12, 10, generator=torch.Generator().manual_seed(0))
METHODS = ["torch", "direct fma"]


@pytest.fixture(params=METHODS)
def fast(request, model):
    made = repkern.optimize_for_inference(model, X, memory=None, cache=False)
    for layer in made.modules():
        if isinstance(layer, InferenceLinear):
            layer.use("plain" if request.param == "torch" else "blocks", request.param)
    return made


def test_the_values_are_those_of_the_model(fast, model):
    wanted = copy.deepcopy(model).double()(X.double())
    assert relative(fast(X), wanted) <= 1e-6
    assert relative(fast(X[:1]), wanted[:1]) <= 1e-6
    assert fast(X[:0]).shape == (0, 5)


def test_report_and_fusion(fast):
    layers = fast.report.layers
    assert [layer.kernel for layer in layers] == ["3->16 3x3 /2", "16->37 linear", "37->5 linear"]
    assert [layer.fused for layer in layers] == [["relu"], ["hardswish"], []]
    assert "oneDNN's fused operators are for convolutions" in layers[1].excluded["onednn packed"]


def test_the_state_dict_is_that_of_the_model(fast, model):
    state = fast.state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
    other = {name: torch.randn_like(value) for name, value in state.items()}
    fast.load_state_dict(other)
    model.load_state_dict(other)
    assert relative(fast(X), copy.deepcopy(model).double()(X.double())) <= 1e-6
    with pytest.raises(RuntimeError, match=r"size mismatch for 4\.weight"):
        fast.load_state_dict({**other, "4.weight": torch.zeros(37, 15)})


def test_copied_and_pickled(fast):
    wanted = fast(X)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(X), wanted)
        assert sum(isinstance(layer, InferenceLinear) for layer in other.modules()) == 2


def test_other_dtypes_and_compilers(fast, model):
    wanted = copy.deepcopy(model).double()(X.double())
    assert relative(copy.deepcopy(fast).double()(X.double()), wanted) <= 1e-12
    compiled = torch.compile(copy.deepcopy(fast), backend="eager", fullgraph=True)
    assert relative(compiled(X), wanted) <= 1e-6


def test_inputs_that_are_no_rows(fast):
    layer = fast.get_submodule("6")
    x = torch.randn(2, 4, 37)
    assert torch.allclose(layer(x), x @ layer.weight.t(), atol=1e-5)
    assert torch.allclose(layer(x[0, 0]), layer.weight @ x[0, 0], atol=1e-5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(2, 36))
    with pytest.raises(TypeError, match="the input must be a tensor, got list"):
        layer([1.0])


def test_a_layer_on_tokens_stays():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Conv1d(4, 4, 1)).eval().requires_grad_(False)
    fast = repkern.optimize_for_inference(model, torch.randn(2, 4, 8))
    assert not any(isinstance(layer, InferenceConv2d) for layer in fast.modules())


def test_a_subclass_stays(randomize):
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(nn.Flatten(), Mine(12, 3)).eval().requires_grad_(False)
    fast = repkern.optimize_for_inference(model, torch.randn(2, 3, 2, 2))
    assert not any(isinstance(layer, InferenceLinear) for layer in fast.modules())
