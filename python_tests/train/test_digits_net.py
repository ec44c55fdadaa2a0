import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from repkern.models.digits import DigitsNet, load_digits_net, save_digits_net


@pytest.mark.parametrize(("widths", "blocks"), [((4,), 1), ((4, 6), 2), ((4, 6, 8), 1)])
def test_shapes_and_round_trip(tmp_path, widths, blocks):
    model = DigitsNet(widths, blocks, num_classes=7, in_chans=2)
    model(torch.randn(8, 2, 8, 8))  # moves the running statistics
    model.eval()
    images = torch.randn(3, 2, 8, 8)
    assert model(images).shape == (3, 7)
    save_digits_net(model, tmp_path / "net.safetensors", test_accuracy=0.5)
    loaded = load_digits_net(tmp_path / "net.safetensors")
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert json.loads(file.metadata()["repkern.digits"])["test_accuracy"] == 0.5


@pytest.mark.parametrize("sizes", [{"widths": ()}, {"widths": (4, 0)}, {"blocks": 0}, {"num_classes": 0}])
def test_impossible_sizes_are_named(sizes):
    with pytest.raises(ValueError, match="sizes must be positive, got"):
        DigitsNet(**sizes)


def test_a_foreign_file_is_an_error(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="was not written by `repkern quickstart`"):
        load_digits_net(tmp_path / "net.safetensors")


def test_a_damaged_file_is_an_error(tmp_path):
    save_digits_net(DigitsNet((4,), 1), tmp_path / "net.safetensors")
    data = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "net.safetensors").write_bytes(data[:-8])
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        load_digits_net(tmp_path / "net.safetensors")


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_digits_net(tmp_path / "net.safetensors")
