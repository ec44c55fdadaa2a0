import json

import pytest
import torch

from repkern.models import create_model, save

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.fixture
def trained(tmp_path):
    model = create_model("repvgg_a0", num_classes=5, width=0.25).requires_grad_(False)
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32))
    save(model.eval(), tmp_path / "in.safetensors")
    return model


def close(got, wanted):
    return float((got.detach() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_onnx_with_any_batch_size(command, trained, tmp_path):
    code, out, err = command("export", "in.safetensors", "net.onnx", "--image-size", "32")
    assert (code, err) == (0, "")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        (got,) = session.run(None, {"input": images.numpy()})
        assert close(torch.from_numpy(got), trained(images))
    values = dict(line.split(None, 1) for line in out.splitlines() if not line.endswith("..."))
    assert values["converted"] == "22 blocks"
    assert values["input"] == "3x32x32, any batch size"
    assert [line.split()[1] for line in out.splitlines() if line.startswith("batch ")] == ["2", "1", "4"]
    assert "net.onnx, ONNX, " in values["written"]


def test_pt2_with_one_batch_size_as_json(command, trained, tmp_path):
    code, out, err = command("export", "in.safetensors", "net.pt2", "--image-size", "24", "--batch", "3", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["model"], found["image_size"], found["dynamic_batch"]) == ("repvgg_a0", 24, False)
    assert [check["batch"] for check in found["checks"]] == [3]
    assert found["checks"][0]["outputs"][0]["within_bound"] is True
    assert found["size_bytes"] == (tmp_path / "net.pt2").stat().st_size
    images = torch.randn(3, 3, 24, 24)
    assert close(torch.export.load(tmp_path / "net.pt2").module()(images), trained(images))


def test_image_size_is_the_network_s_own_unless_given(command, tmp_path):
    model = create_model("vgg16_cifar", num_classes=3, width=0.125, block="plain")
    save(model, tmp_path / "in.pth")
    code, out, _ = command("export", "in.pth", "net.pt2", "--no-verify")
    assert code == 0
    assert "3x32x32, any batch size" in out
    assert "nothing: it was in deployed form" in out
    assert "not compared (--no-verify)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["net.safetensors"], "must end in .onnx or .pt2, got 'net.safetensors'"),
        (["net.pt2", "--opset", "18"], "--opset (=18) is for .onnx files"),
        (["net.onnx", "--batch", "some"], "--batch must be dynamic or a number from 1, got 'some'"),
        (["net.onnx", "--batch", "0"], "got '0'"),
        (["net.onnx", "--image-size", "0"], "--image-size"),
        (["net.onnx", "--model", "nonsense"], "there is no model 'nonsense'"),
    ],
)
def test_wrong_use_is_exit_code_2(command, trained, words, message):
    code, out, err = command("export", "in.safetensors", *words)
    assert (code, out) == (2, "")
    assert message in err


def test_a_failure_is_exit_code_1_and_leaves_nothing(command, trained, tmp_path):
    code, _, err = command("export", "in.safetensors", "net.onnx", "--model", "resnet18")
    assert code == 1
    assert "but it holds 'repvgg_a0'" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors"]
