import json

import numpy
import pytest
import torch

from repkern.deploy.quantize import load_quantized
from repkern.deploy.quantize_report import sqnr
from repkern.deploy.quantize_torchao import missing_torchao
from repkern.models import create_model, save

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.skipif(missing_torchao() is not None, reason="torchao is not installed")

WORDS = ("quantize", "in.safetensors", "out.pt2", "--calibration", "photographs", "--image-size", "32")


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    model = create_model("repvgg_a0", num_classes=5, width=0.125).requires_grad_(False)
    for _ in range(4):
        model(2 * torch.randn(8, 3, 32, 32))
    save(model.eval(), tmp_path / "in.safetensors")
    generator = numpy.random.default_rng(0)
    for at in range(9):
        folder = tmp_path / "photographs" / f"class{at % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (32, 40, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{at}.png")
    return model


def test_a_checkpoint_becomes_int8(command, network, tmp_path):
    code, out, err = command(*WORDS, "--images", "6", "--layers", "3")
    assert (code, err) == (0, "")
    assert "on 6 images 32x32, pixels imagenet" in out
    assert "Layers whose quantization alone" in out
    assert sum("conv" in line for line in out.splitlines()) >= 2
    quantized = load_quantized(tmp_path / "out.pt2")
    assert quantized.info["calibration_images"] == 6
    assert quantized.info["model"] == "repvgg_a0"
    images = 2 * torch.randn(4, 3, 32, 32)
    assert sqnr(network(images), quantized(images)) > 20


def test_json(command, network):
    code, out, _ = command(*WORDS, "--json", "--normalize", "signed")
    assert code == 0
    found = json.loads(out)
    assert found["normalize"] == "signed"
    assert found["calibration_images"] == 9
    assert len(found["sensitivity"]["layers"]) == 23
    assert found["size_bytes"][1] > 0


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("quantize", "in.safetensors", "out.onnx", "--calibration", "photographs"), 2, ".pt2"),
        (("quantize", "in.safetensors", "out.pt2"), 2, "--calibration"),
        (("quantize", "in.safetensors", "out.pt2", "--calibration", "empty"), 1, "has no images"),
    ],
)
@pytest.mark.usefixtures("network")
def test_what_cannot_be(command, tmp_path, words, code, text):
    (tmp_path / "empty").mkdir()
    got, _, err = command(*words)
    assert got == code
    assert text in err
    assert not (tmp_path / "out.pt2").exists()


def test_untouched_norms_are_said(command, network, tmp_path):
    save(create_model("repvgg_a0", num_classes=5, width=0.125).eval(), tmp_path / "in.safetensors")
    code, _, err = command(*WORDS)
    assert code == 0
    assert "have never seen data" in err


@pytest.mark.usefixtures("network")
def test_without_torchao(command, monkeypatch, tmp_path):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else real(name))
    code, _, err = command(*WORDS)
    assert code == 1
    assert "pip install 'repkern[quantize]'" in err
    assert not (tmp_path / "out.pt2").exists()
