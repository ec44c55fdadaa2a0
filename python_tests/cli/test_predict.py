"""`repkern predict`: the classes of image files."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

import repkern
from repkern.data import DataRecipe
from repkern.models import save
from repkern.train.predicting import predict

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits, long enough to know some of them."""
    from typer.testing import CliRunner

    from repkern.cli.main import app

    out = tmp_path_factory.mktemp("run") / "digits"
    words = ["model.options={widths: [16, 32], blocks: 1}", "data.augment=[]", "train.epochs=8", "train.threads=1"]
    changes = [word for change in words for word in ("--set", change)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done = CliRunner().invoke(app, ["train", "digits_plain", "--out", str(out), *changes])
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def digits(tmp_path):
    """Forty test images as files, with their labels."""
    from repkern.data import open_digits

    _, test = open_digits()
    files = []
    for number in range(40):
        pixels = (test.images[number, 0].float() * (255 / 16)).round().to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
        files.append((f"{number}.png", str(test.classes[int(test.labels[number])])))
    return files


def test_images_get_the_classes_of_the_run(command, run, digits):
    code, out, _ = command("predict", *(name for name, _ in digits), "--checkpoint", str(run), "--json")
    assert code == 0
    found = json.loads(out)
    assert [entry["image"] for entry in found] == [name for name, _ in digits]
    assert all(len(entry["classes"]) == 5 for entry in found)
    for entry in found:
        probabilities = [one["probability"] for one in entry["classes"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1 + 1e-6
    right = sum(entry["classes"][0]["class"] == label for entry, (_, label) in zip(found, digits, strict=True))
    assert right >= 30  # of 40: the run has more than 90 % of all


def test_a_table_for_people(command, run, digits):
    code, out, _ = command("predict", digits[0][0], digits[1][0], "-c", str(run), "--top", "2")
    assert code == 0
    lines = out.splitlines()
    assert (lines[0], lines[3]) == (digits[0][0], digits[1][0])
    assert len(lines) == 6
    assert lines[1].endswith("%")


def test_a_file_without_names(command, tmp_path):
    torch.manual_seed(0)
    model = repkern.create_model("resnet18", num_classes=4, width=0.25)
    save(model, tmp_path / "net.safetensors")
    Image.new("L", (40, 30), 99).save(tmp_path / "grey.png")
    code, out, _ = command("predict", "grey.png", "-c", "net.safetensors", "--json", "-s", "data.image_size=32")
    assert code == 0
    (entry,) = json.loads(out)
    assert {one["class"] for one in entry["classes"]} == {"0", "1", "2", "3"}


def test_what_cannot_be_seen(command, run, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    for words, code, expected in (
        (["text.png", "-c", str(run)], 1, "text.png"),
        (["none.png", "-c", str(run)], 1, "none.png"),
        (["good.png", "-c", "none"], 2, "there is no none"),
        (["good.png", "-c", str(run), "--top", "0"], 2, "--top"),
        (["good.png"], 2, "--checkpoint"),
    ):
        found, _, err = command("predict", *words)
        assert (found, expected in err) == (code, True), err


class Mean(nn.Module):
    """Scores are the mean of each channel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.mean(dim=(2, 3)) * self.weight


def test_images_are_prepared_as_for_a_test(tmp_path):
    Image.new("RGB", (20, 10), (255, 128, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 9), (0, 255, 0)).save(tmp_path / "b.png")
    data = DataRecipe(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.25))
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for size in (0, 6):  # of their own size one at a time
        first, second = predict(Mean(), paths, ("red", "green", "blue"), data, channels=3, image_size=size, top=3)
        expected = torch.tensor([1.0, 128 / 255 * 2 - 1, -2.0]).softmax(0).tolist()
        assert [name for name, _ in first.classes] == ["red", "green", "blue"]
        assert [p for _, p in first.classes] == pytest.approx(expected, abs=1e-6)
        assert second.classes[0][0] == "green"


def test_bad_arguments(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    options = {"data": DataRecipe(), "channels": 3, "image_size": 8}
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        list(predict(Mean(), [tmp_path / "a.png"], "abc", top=0, **options))
    with pytest.raises(ValueError, match="the network has 3 outputs, but there are names of 2 classes"):
        list(predict(Mean(), [tmp_path / "a.png"], "ab", **options))
    with pytest.raises(ValueError, match="does not take images of 3x8x8"):
        list(predict(nn.Conv2d(1, 2, 3), [tmp_path / "a.png"], "ab", **options))
