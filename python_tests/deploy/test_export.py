"""Exported files compute what the training form does, on any batch size, or are not written."""

import json
import logging
import zipfile

import pytest
import torch
from torch import nn

import repkern
from repkern.deploy import _formats, export
from repkern.models import create_model
from repkern.nn import OREPABlock, RepVGGBlock

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SUFFIXES = ["onnx", "pt2"]


class TwoInputs(nn.Module):
    """A user's model: two images, two outputs, a number in between, and a layer that is no block."""

    def __init__(self):
        super().__init__()
        self.a = RepVGGBlock(3, 6, 3, activation=nn.ReLU(), se=2)
        self.b = OREPABlock(3, 6, 3, stride=2)
        self.last = nn.Linear(6, 4)

    def forward(self, x, scale, y):
        a, b = self.a(x), self.b(y) * scale
        return {"map": a, "scores": self.last(a.mean((2, 3)) + b.mean((2, 3)))}


@pytest.fixture
def model(randomize):
    return randomize(nn.Sequential(RepVGGBlock(3, 6, 3, 2, activation=nn.ReLU()), OREPABlock(6, 4, 3))).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 9, 8)


def run_onnx(path, *args):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return names, session.run(None, dict(zip(names, [arg.numpy() for arg in args], strict=True)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_runs_on_other_batch_sizes_and_the_report_says_how_far_off(model, x, tmp_path, suffix):
    path = tmp_path / f"net.{suffix}"
    report = export(model, path, x)
    assert [check.batch for check in report.checks] == [2, 1, 4]
    assert report.conversion.converted == {"0": "RepVGGBlock", "1": "OREPABlock"}
    assert report.conversion.outputs
    assert report.size_bytes == path.stat().st_size
    assert all(output.within_bound for check in report.checks for output in check.outputs)
    assert report.worst.worst.relative == max(check.worst.relative for check in report.checks)
    images = torch.randn(7, 3, 9, 8)
    if suffix == "onnx":
        names, (got,) = run_onnx(path, images)
        assert names == ["input"]
        got = torch.from_numpy(got)
    else:
        got = torch.export.load(path).module()(images)
    wanted = model.double()(images.double())
    assert float((got.detach() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert isinstance(model[0], RepVGGBlock), "the model given must stay"
    json.dumps(report.as_json(), allow_nan=False)
    assert f"batch 4, the output: {report.checks[2].worst.absolute:.3g}" in str(report)


def test_an_example_is_a_tensor_or_a_tuple(model, tmp_path):
    with pytest.raises(TypeError, match="must be a tensor or a tuple of arguments, got int"):
        export(model, tmp_path / "model.onnx", 64)


def test_an_example_of_one_image_gives_a_dynamic_batch_all_the_same(model, x, tmp_path):
    report = export(model, tmp_path / "net.pt2", x[:1])
    assert [check.batch for check in report.checks] == [2, 1, 3]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_fixed_batch_is_fixed(model, x, tmp_path, suffix):
    path = tmp_path / f"net.{suffix}"
    assert [check.batch for check in export(model, path, x, dynamic_batch=False).checks] == [2]
    if suffix == "onnx":
        dims = [dim.dim_value for dim in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
        assert dims == [2, 3, 9, 8]
    else:
        with pytest.raises(Exception, match="shape"):
            torch.export.load(path).module()(x[:1])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_several_inputs_and_outputs(randomize, tmp_path, suffix):
    model = randomize(TwoInputs())
    args = (torch.randn(2, 3, 8, 8), 0.5, torch.randn(2, 3, 12, 12))
    report = export(model, tmp_path / f"net.{suffix}", args, output_names=["map", "scores"])
    assert [len(check.outputs) for check in report.checks] == [2, 2, 2]
    if suffix == "onnx":
        names, outputs = run_onnx(tmp_path / "net.onnx", torch.zeros(3, 3, 8, 8), torch.zeros(3, 3, 12, 12))
        assert names == ["input_0", "input_1"]
        assert [output.shape for output in outputs] == [(3, 6, 8, 8), (3, 4)]
        assert [value.name for value in onnx.load(tmp_path / "net.onnx").graph.output] == ["map", "scores"]


def test_a_network_of_ours_says_what_it_is(randomize, tmp_path):
    model = randomize(create_model("vgg16_cifar", block="repvgg", num_classes=3, width=0.125))
    export(model, tmp_path / "net.onnx", torch.randn(1, 3, 32, 32), opset=20)
    proto = onnx.load(tmp_path / "net.onnx")
    assert proto.opset_import[0].version == 20
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    assert properties["repkern"] == repkern.__version__
    assert json.loads(properties["model"])["model_name"] == "vgg16_cifar"
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert (dims[0].dim_param, [dim.dim_value for dim in dims[1:]]) == ("batch", [3, 32, 32])
    assert not {node.op_type for node in proto.graph.node} & {"BatchNormalization", "Add"}


def test_the_files_hold_no_pixels_and_no_folders_of_this_machine(model, x, tmp_path):
    export(model, tmp_path / "net.pt2", x)
    export(model, tmp_path / "net.onnx", x)
    package = str(repkern.__path__[0]).encode()
    torchs = str(torch.__path__[0]).encode()
    with zipfile.ZipFile(tmp_path / "net.pt2") as file:
        contents = [file.read(name) for name in file.namelist()]
    pixels = x[0, 0, 0].numpy().tobytes()
    for content in [*contents, (tmp_path / "net.onnx").read_bytes()]:
        assert pixels not in content
        assert package not in content
        assert torchs not in content


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_exporting_says_nothing(model, x, tmp_path, suffix, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        export(model, tmp_path / f"net.{suffix}", x)  # warnings are errors here
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_differs_is_not_written(model, x, tmp_path, suffix, monkeypatch):
    path = tmp_path / f"net.{suffix}"
    path.write_text("old")
    chosen = _formats.FORMATS[f".{suffix}"]

    def open_wrongly(file):
        run = chosen.open(file)
        return lambda args: [output + (1e-3 if len(output) == 4 else 0) for output in run(args)]

    monkeypatch.setitem(_formats.FORMATS, f".{suffix}", chosen._replace(open=open_wrongly))
    with pytest.raises(ValueError, match=r"file differs from the training form on a batch of 4: the output: 0\.001"):
        export(model, path, x)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(f"net.{suffix}", "old")]
    export(model, path, x, verify=False)
    assert path.read_bytes() != b"old"


def test_a_batch_that_the_network_mixes_is_found(x, tmp_path):
    class Mixing(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True) * (0.0 if x.shape[0] == 2 else 1.0)

    report = export(Mixing(), tmp_path / "net.onnx", x, dynamic_batch=False)
    assert [check.batch for check in report.checks] == [2]
    with pytest.raises(ValueError, match=r"torch\.export cannot trace the model"):
        export(Mixing(), tmp_path / "dynamic.onnx", x)


def test_train_mode_warns_and_the_file_is_that_of_eval_mode(model, x, tmp_path):
    with pytest.warns(UserWarning, match="train mode"):
        export(model.train(), tmp_path / "net.pt2", x)
    assert model.training
    got = torch.export.load(tmp_path / "net.pt2").module()(x)
    wanted = model.eval()(x)
    assert float((got.detach() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "net.tflite"}, ValueError, r"must end in \.onnx or \.pt2, got 'net\.tflite'"),
        ({"path": "net.pt2", "opset": 18}, ValueError, r"opset \(=18\) is for \.onnx files"),
        ({"opset": 99}, ValueError, "opset 99 is not possible"),
        ({"path": "none/net.onnx"}, FileNotFoundError, "does not exist"),
        (
            {"example": (torch.zeros(2, 3, 8, 8), torch.zeros(3, 3))},
            ValueError,
            r"one common first dimension.*\[2, 3\]",
        ),
        ({"example": torch.zeros(0, 3, 8, 8)}, ValueError, "empty batch"),
    ],
)
def test_wrong_arguments_are_named(randomize, tmp_path, arguments, error, message):
    model = randomize(OREPABlock(3, 4, 3))
    if isinstance(arguments.get("example"), tuple):
        model = nn.Bilinear(3, 3, 1)
    path = tmp_path / arguments.get("path", "net.onnx")
    verify = "example" not in arguments
    options = {"opset": arguments["opset"]} if "opset" in arguments else {}
    with pytest.raises(error, match=message):
        export(model, path, arguments.get("example", torch.zeros(1, 3, 8, 8)), verify=verify, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_the_runtime_has_no_kernel_for_is_said(model, x, tmp_path):
    with pytest.raises(
        ValueError, match=r"ONNX file cannot be opened by its runtime: .*Could not find an implementation"
    ):
        export(model.double(), tmp_path / "net.onnx", x.double())
    assert list(tmp_path.iterdir()) == []
    assert export(model, tmp_path / "net.pt2", x.double()).worst.worst.relative <= 1e-14


def test_without_the_packages_the_error_says_what_to_install(model, x, tmp_path, monkeypatch):
    missing = _formats.FORMATS[".onnx"]._replace(packages=("onnx", "no_such_package"))
    monkeypatch.setitem(_formats.FORMATS, ".onnx", missing)
    with pytest.raises(ImportError, match=r"ONNX needs no_such_package: pip install 'repkern\[export\]'"):
        export(model, tmp_path / "net.onnx", x)
