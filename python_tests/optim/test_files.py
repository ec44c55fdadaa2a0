"""Files of scales: ours, the released ones, and what is neither."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from repkern import create_model
from repkern.models.digits import DigitsNet
from repkern.optim import from_scales, load_scales, save_scales
from repkern.search import HyperSearch


def random_scales(model, **options):
    return {name: torch.rand(s.shape) + 0.5 for name, s in HyperSearch(model, **options).scales().items()}


def released_names(scales):
    """As the authors' files have them: stages counted from 1 behind the stem, which is stage0."""
    parts = {"dense_scale": "scale_conv", "pointwise_scale": "scale_1x1", "identity_scale": "scale_identity"}
    renamed = {}
    for name, scale in scales.items():
        layer, _, part = name.rpartition(".")
        _, *at = layer.split(".")
        where = f"stage{int(at[0]) + 1}.{at[1]}" if at else "stage0"
        renamed[f"{where}.{parts[part]}.weight"] = scale
    return renamed


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def test_round_trip(tmp_path):
    model = DigitsNet((4, 8), 1)
    scales = random_scales(model)
    path = tmp_path / "scales.safetensors"
    save_scales(scales, path, data="digits", epochs=3)
    assert same_tensors(load_scales(path), scales)
    assert same_tensors(load_scales(str(path), model), scales)
    with safe_open(path, framework="pt") as file:
        notes = json.loads(file.metadata()["repkern.scales"])
    assert set(notes.pop("sha256")) == {"notes", "tensors"}
    assert notes == {"data": "digits", "epochs": 3}
    first = path.read_bytes()
    save_scales(scales, path, data="digits", epochs=3)
    assert path.read_bytes() == first
    from_scales(model, path, lr=0.1)


def test_released_files(tmp_path):
    """A *-scales.pth, and the checkpoint of a whole search, of which only the scales count."""
    model = create_model("repopt_vgg_b1", width=0.0625, num_classes=3)
    scales = random_scales(model)
    torch.save(released_names(scales), tmp_path / "RepOpt-VGG-B1-scales.pth")
    found = load_scales(tmp_path / "RepOpt-VGG-B1-scales.pth", model)
    assert same_tensors(dict(sorted(found.items())), dict(sorted(scales.items())))
    assert len(from_scales(model, tmp_path / "RepOpt-VGG-B1-scales.pth", lr=0.1).grad_mults) == 28
    search = HyperSearch(model, initial=scales)
    torch.save({"model": search.model.state_dict(), "epoch": 3}, tmp_path / "search.pth")
    assert same_tensors(dict(sorted(load_scales(tmp_path / "search.pth", model).items())), dict(sorted(scales.items())))
    excited = create_model("repopt_vgg_b1_se", width=0.0625, num_classes=3)
    assert "stages.2.3.conv.dense_scale" in load_scales(tmp_path / "RepOpt-VGG-B1-scales.pth", excited)
    other = create_model("repopt_vgg_l1", width=0.0625, num_classes=3)
    with pytest.raises(ValueError, match=r"missing: stages\.0\.4\.dense_scale"):
        load_scales(tmp_path / "RepOpt-VGG-B1-scales.pth", other)
    small = create_model("repopt_vgg_b1", width=0.125, num_classes=3)
    with pytest.raises(ValueError, match=r"does not match RepVGG"):
        from_scales(small, tmp_path / "RepOpt-VGG-B1-scales.pth", lr=0.1)


def test_what_is_not_written(tmp_path):
    scales = random_scales(DigitsNet((4,), 1))
    for bad, message in [
        ({**scales, "stem.0.dense_scale": torch.full((4,), torch.nan)}, "stem.0.dense_scale is not finite: the search"),
        ({"weight": torch.ones(3)}, "scales are named LAYER"),
        ({}, "there are no scales"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_scales(bad, tmp_path / "scales.safetensors")
    with pytest.raises(ValueError, match=r"scales are written as \.safetensors, got .*scales\.pth"):
        save_scales(scales, tmp_path / "scales.pth")
    with pytest.raises(FileNotFoundError, match="absent"):
        save_scales(scales, tmp_path / "absent" / "scales.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_read(tmp_path):
    model = DigitsNet((4,), 1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing\.pth"):
        load_scales(tmp_path / "nothing.pth")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="no tensor of layout 'repopt_scales'"):
        load_scales(tmp_path / "weights.safetensors", model)
    save_scales(random_scales(model), tmp_path / "scales.safetensors")
    half = (tmp_path / "scales.safetensors").read_bytes()[:200]
    (tmp_path / "half.safetensors").write_bytes(half)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_scales(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"no such convolution|other layers of its kind"):
        load_scales(tmp_path / "scales.safetensors", DigitsNet((4, 8), 1))


class Runs:
    def __reduce__(self):
        return warnings.warn, ("code in the file was run",)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"stem.0.dense_scale": Runs()}, tmp_path / "scales.pth")
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        load_scales(tmp_path / "scales.pth")
