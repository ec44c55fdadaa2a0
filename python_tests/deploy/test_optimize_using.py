"""What optimize_for_inference returns is a module like any other; how it chooses, and what it refuses."""

import copy
import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import repkern
from repkern.deploy import InferenceConv2d
from repkern.deploy._methods import METHODS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REPKERN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def prefer(monkeypatch):
    """Pretends that the given methods are the fastest, in this order."""

    def chosen(*names):
        times = {name: 9.0 for name in METHODS} | {name: 1.0 + at for at, name in enumerate(names)}
        monkeypatch.setattr("repkern.deploy._choice.time_calls", lambda calls, x: {name: times[name] for name in calls})

    return chosen


class Unit(nn.Module):
    """A residual unit that a graph can see."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + self.project(x))


@pytest.fixture
def model(randomize):
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.ReLU(),
            Unit(16),
            Unit(16),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        )
    )


FORMS = ["torch", "onednn packed", "winograd F4", "winograd F2 transformed", "direct split"]
x = torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FORMS)
def fast(request, model, prefer):
    prefer(request.param)
    made = repkern.optimize_for_inference(model, x, memory=None)
    made(x)
    return made


def near(got, wanted):
    assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_copied_pickled_and_saved(fast):
    wanted = fast(x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), wanted)
        assert str(again.report) == str(fast.report)
        assert list(again.state_dict()) == list(fast.state_dict())
        with torch.no_grad():
            again.get_submodule("6").bias.add_(1)  # what the copy computes with is its own
        assert torch.allclose(again(x), wanted + 1, atol=1e-4)
        assert torch.equal(fast(x), wanted)


def test_its_state_dict_is_that_of_the_folded_model(fast, model, prefer):
    state = {name: value.clone() for name, value in fast.state_dict().items()}
    assert set(state) == {
        *("0.weight", "0.bias"),
        *(
            f"{unit}.{name}"
            for unit in (2, 3)
            for name in ("project.weight", "project.bias", "conv.weight", "conv.bias")
        ),
        *("6.weight", "6.bias"),
    }
    assert state["2.conv.weight"].shape == (16, 16, 3, 3)
    prefer("direct fma")
    other = repkern.optimize_for_inference(model, x, cache=False)
    for value in other.state_dict().values():
        value.zero_()
    changed = {name: 0.5 * value for name, value in state.items()}
    other.load_state_dict(changed, strict=True)
    before = fast(x)
    fast.load_state_dict(changed, strict=True)
    near(fast(x), other(x))
    assert not torch.allclose(fast(x), before)
    fast.load_state_dict(state, strict=True)
    assert torch.equal(fast(x), before)


def test_wrong_state_dicts_are_named(fast):
    state = fast.state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.weight"'):
        fast.load_state_dict({name: value for name, value in state.items() if name != "0.weight"})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.more"'):
        fast.load_state_dict(state | {"0.more": x})
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight: .*\[1\]"):
        fast.load_state_dict(state | {"0.weight": torch.ones(1)})


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph(fast, backend):
    torch._dynamo.reset()
    near(torch.compile(fast, backend=backend, fullgraph=True)(x), fast(x))


def test_exported(fast):
    program = torch.export.export(fast, (x,))
    near(program.module()(x), fast(x))


def test_traced_by_torch_jit(fast):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(fast, x, check_trace=False)
    near(traced(x + 1), fast(x + 1))


def test_several_threads_at_once(fast):
    """Sizes that were never seen, so that threads prepare calls at the same time."""
    images = [torch.randn(1 + at % 2, 3, 32 + 2 * (at % 5), 30) for at in range(20)]
    wanted = [copy.deepcopy(fast)(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(fast, images), wanted, strict=True):
            assert torch.equal(got, expected)


def test_under_inference_mode_and_in_any_memory_format(fast, model):
    wanted = model(x)
    with torch.inference_mode():
        near(fast(x), wanted)
    near(fast(x.contiguous(memory_format=torch.channels_last)), wanted)
    near(fast(x[:, :, ::1].transpose(2, 3).contiguous().transpose(2, 3)), wanted)
    wide = torch.randn(4, 6, 40, 36)
    near(fast(wide[::2, 1:4]), model(wide[::2, 1:4]))


def test_moved_to_another_dtype(fast, model):
    twice = copy.deepcopy(fast).double()
    assert float((twice(x.double()) - copy.deepcopy(model).double()(x.double())).abs().max()) < 1e-5
    assert torch.equal(copy.deepcopy(fast).float()(x), fast(x))
    assert torch.equal(copy.deepcopy(fast).to(memory_format=torch.channels_last)(x), fast(x))


def test_no_training_and_no_gradients(fast):
    with pytest.raises(RuntimeError, match=r"gives no gradients.*use the model it was made from"):
        fast(x.clone().requires_grad_())
    with torch.no_grad():
        fast(x.clone().requires_grad_())
    assert not fast(x).requires_grad
    with pytest.raises(RuntimeError, match=r"no training mode: call eval\(\)"):
        fast.train()(x)
    fast.eval()(x)


def test_wrong_inputs_never_reach_native_code(fast):
    for wrong, error in (
        (torch.randn(2, 4, 40, 36), RuntimeError),
        (torch.randn(3, 40), RuntimeError),
        (x.long(), RuntimeError),
        (x.double(), RuntimeError),
        (None, TypeError),
    ):
        with pytest.raises(error):
            fast(wrong)


def test_unbatched_input(model, prefer):
    prefer("winograd F4")
    body = nn.Sequential(model[0], model[1], model[2].conv)
    fast = repkern.optimize_for_inference(body, x)
    near(fast(x[0]), body(x[0]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_inside(model, prefer, precision):
    prefer("winograd F2")
    fast = repkern.optimize_for_inference(model, x, precision=precision)
    wanted = model(x)
    assert fast(x).dtype == torch.float32
    assert float((fast(x) - wanted).abs().max()) <= 0.03 * float(wanted.abs().max())
    assert fast.state_dict()["0.weight"].dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert any(layer.method == "winograd F2" for layer in fast.report.layers)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "fp8"}, ValueError, "precision must be one of fp32, tf32, bf16, fp16, got 'fp8'"),
        ({"precision": "tf32"}, ValueError, "is of GPUs, the model is on cpu"),
        ({"accuracy": "high"}, ValueError, "accuracy must be one of exact, default, fast, got 'high'"),
        ({"memory": 0.5}, ValueError, "memory must be at least 1 or None, got 0.5"),
        ({"methods": "torch"}, TypeError, "must be a collection of names, got the string 'torch'"),
        ({"methods": ["magic"]}, ValueError, "there is no method magic; there are torch, onednn"),
    ],
)
def test_options_that_cannot_be(model, options, error, message):
    with pytest.raises(error, match=message):
        repkern.optimize_for_inference(model, x, **options)


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        (torch.empty(0, 3, 8, 8), ValueError, r"must not be empty, got a tensor \(0, 3, 8, 8\)"),
        (torch.full((1, 3, 8, 8), float("nan")), ValueError, "hold NaN or infinite values"),
        ((), ValueError, "hold no floating-point tensor"),
        (7, TypeError, "must be a tensor or a tuple of arguments, got int"),
        (torch.empty(1, 3, 8, 8, device="meta"), ValueError, "on cpu but example_inputs are on meta"),
    ],
)
def test_examples_that_cannot_be(model, example, error, message):
    with pytest.raises(error, match=message):
        repkern.optimize_for_inference(model, example)


def test_models_that_cannot_be(model):
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got function"):
        repkern.optimize_for_inference(lambda x: x, x)
    with pytest.raises(ValueError, match="is optimized already"):
        repkern.optimize_for_inference(repkern.optimize_for_inference(model, x, methods=[]), x)


def layer_named(report, name):
    return next(layer for layer in report.layers if layer.name == name)


def test_wrong_results_are_not_chosen(model, prefer, monkeypatch):
    """A method whose result is off by more than the limit is excluded with the reason, however fast it is."""
    prefer("winograd F2")
    method = METHODS["winograd F2"]

    def off(*args):
        call = method.prepare(*args)
        return lambda x, residual: call(x, residual) * (1 + 1e-5)

    monkeypatch.setitem(METHODS, "winograd F2", method._replace(prepare=off))
    report = repkern.optimize_for_inference(model, x).report
    assert "winograd F2" not in {layer.method for layer in report.layers}
    assert "relative error 1.0e-05, the limit is 5.0e-06" in layer_named(report, "2.conv").excluded["winograd F2"]


def test_results_that_are_not_finite_are_not_chosen(model, prefer, monkeypatch):
    prefer("winograd F2")
    method = METHODS["winograd F2"]
    monkeypatch.setitem(
        METHODS,
        "winograd F2",
        method._replace(prepare=lambda *args: lambda x, residual: method.prepare(*args)(x, residual) / 0),
    )
    report = repkern.optimize_for_inference(model, x).report
    assert "not finite" in layer_named(report, "2.conv").excluded["winograd F2"]


def test_end_to_end_difference_excludes_methods(prefer, monkeypatch):
    prefer("winograd F4", "winograd F2")
    monkeypatch.setitem(repkern.deploy.optimize._END_TO_END, "default", 1e-9)
    body = nn.Sequential(nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)  # else torch itself differs a little
    example = torch.randn(1, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    report = repkern.optimize_for_inference(body, example).report
    assert report.layers[0].method in ("torch", "onednn", "onednn packed")
    assert [note.partition(":")[0] for note in report.notes] == ["Winograd F4 is not used", "Winograd F2 is not used"]
    assert report.layers[0].excluded["winograd F4"] == "the outputs of the model would differ too much"


def test_memory_is_kept_within_the_limit(model, prefer):
    prefer("winograd F4 transformed", "winograd F4")
    body = nn.Sequential(*[Unit(48) for _ in range(3)]).eval().requires_grad_(False)
    small = torch.randn(1, 48, 5, 5)
    report = repkern.optimize_for_inference(body, small, memory=None).report
    assert report.weight_bytes[1] > 4 * report.weight_bytes[0]
    report = repkern.optimize_for_inference(body, small).report
    assert report.weight_bytes[1] <= 1.5 * report.weight_bytes[0] + 2 * small.numel() * 4
    assert {layer.method for layer in report.layers if "3x3" in layer.kernel} == {"winograd F4"}
    assert "the fastest that `memory` allows" in {layer.why for layer in report.layers}
    assert "method" in str(report)
    json.dumps(report.as_json())


def test_saved_models_load_in_a_new_process(model, prefer, tmp_path, run_python):
    prefer("winograd F4", "direct split")
    fast = repkern.optimize_for_inference(model, x)
    torch.save({"model": fast, "x": x, "y": fast(x)}, tmp_path / "fast.pt")
    code = (
        f"import sys, torch; torch.set_num_threads({torch.get_num_threads()}); "
        "d = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(d['model'](d['x']), d['y']); print('equal')"
    )
    result = run_python("-c", code, tmp_path / "fast.pt")
    assert result.stdout.strip() == "equal", result.stderr


def test_files_hold_plain_weights_and_load_where_a_method_is_missing(model, prefer, monkeypatch):
    prefer("direct split", "winograd F4")
    fast = repkern.optimize_for_inference(model, x)
    used = {module.method for module in fast.modules() if isinstance(module, InferenceConv2d)}
    file = pickle.dumps(fast)
    missing = {name: METHODS[name]._replace(why_not=lambda spec, maps: "not here") for name in used - {"torch"}}
    monkeypatch.setattr("repkern.deploy.inference_conv.METHODS", METHODS | missing)
    elsewhere = pickle.loads(file)
    near(elsewhere(x), fast(x))
    assert {module.method for module in elsewhere.modules() if isinstance(module, InferenceConv2d)} == {"torch"}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_forced_backends(model, prefer, backend):
    """Also after calls were prepared for the one that was chosen."""
    prefer("winograd F4", "direct fma")
    fast = repkern.optimize_for_inference(model, x)
    wanted = fast(x)
    with repkern.use_backend(backend):
        near(fast(x), wanted)
    assert torch.equal(fast(x), wanted)


def test_peak_memory(tmp_path, prefer, run_python):
    """Of inference over the interpreter's own, against torch's, each in a process of its own (Linux counts it)."""
    code = """
import resource, sys, torch
torch.set_num_threads(1)
import repkern
assert repkern.available_backends()["cpu"] is None
torch.conv2d(torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = torch.load(sys.argv[1], weights_only=False)
x = torch.ones(1, 512, 14, 14).contiguous(memory_format=torch.channels_last)
with torch.inference_mode():
    model(x)
    model(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    prefer("winograd F4 transformed", "direct split")  # the largest forms: the limit decides
    body = nn.Sequential(*[nn.Conv2d(512, 512, 3, padding=1) for _ in range(4)]).requires_grad_(False)
    torch.save(body.to(memory_format=torch.channels_last), tmp_path / "torch.pt")
    example = torch.ones(1, 512, 14, 14).contiguous(memory_format=torch.channels_last)
    torch.save(repkern.optimize_for_inference(body, example, cache=False), tmp_path / "ours.pt")

    def peak(name):
        result = run_python("-c", code, tmp_path / f"{name}.pt")
        assert result.returncode == 0, result.stderr
        return int(result.stdout)

    assert peak("ours") <= 1.5 * peak("torch")


def test_layers_show_what_they_are(fast):
    layer = next(module for module in fast.modules() if isinstance(module, InferenceConv2d))
    assert layer.method in repr(layer)
    assert "kernel_size=(3, 3)" in repr(fast)
