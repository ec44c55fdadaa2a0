"""`repkern eval` and what it shares with `predict`: networks from runs and from files."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import repkern
from repkern.models import save
from repkern.models.digits import DigitsNet, save_digits_net
from repkern.train.checkpoint import CheckpointFolder
from repkern.train.trained import load_trained

TINY = """
base: digits_plain
about: a network that is trained in two seconds
model: {options: {widths: [6, 8], blocks: 1}}
data: {limit: 256, augment: []}
train: {epochs: 3, batch_size: 64, threads: 1}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folders of the tiny network: plain, and with OREPA put in and a moving average."""
    from typer.testing import CliRunner

    from repkern.cli.main import app

    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, changes in (("plain", []), ("ema", ["ema={decay: 0.9}", "model.replace={block: OREPAConv2d}"])):
        words = [word for change in changes for word in ("--set", change)]
        done = CliRunner().invoke(app, ["train", str(folder / "tiny.yaml"), "--out", str(folder / name), *words])
        assert done.exit_code == 0, done.output
    torch.set_num_threads(threads)
    return folder


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["plain", "ema"])
def test_a_run_gives_the_accuracy_it_had(command, trained, name):
    for which, row in (("last", rows(trained / name)[-1]), ("best", max(rows(trained / name), key=by_accuracy))):
        code, out, _ = command("eval", str(trained / name), "--which", which, "--json", "--threads", "1")
        assert code == 0
        found = json.loads(out)
        assert (found["images"], found["classes"], found["step"]) == (355, 10, row["step"])
        assert found["test_accuracy"] == row["test_accuracy"]
        assert found["test_loss"] == pytest.approx(row["test_loss"], rel=1e-6)


def by_accuracy(row):
    return row["test_accuracy"]


def test_one_checkpoint_of_a_run(command, trained):
    first = rows(trained / "plain")[-2]
    path = CheckpointFolder(trained / "plain" / "checkpoints").path(first["step"])
    _, out, _ = command("eval", str(path), "--json")
    assert json.loads(out)["test_accuracy"] == first["test_accuracy"]
    code, out, _ = command("eval", str(path))
    assert code == 0
    assert "355 of 10 classes, digits" in out


def test_the_network_of_a_run(trained):
    found = load_trained(trained / "ema")
    assert found.classes == tuple("0123456789")
    assert (found.channels, found.image_size) == (1, 8)
    assert any(type(module).__name__ == "OREPAConv2d" for module in found.model.modules())
    assert not found.model.training
    weights = load_trained(trained / "ema", "last").model.state_dict()
    saved = load_file(str(trained / "ema" / "model.safetensors"))
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    assert found.metrics["test_accuracy"] == max(row["test_accuracy"] for row in rows(trained / "ema"))


def make_folder(folder, classes=("a", "b"), size=16):
    generator = torch.Generator().manual_seed(3)
    for part in ("train", "test"):
        for label in classes:
            (folder / part / label).mkdir(parents=True)
            for number in range(3):
                pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / part / label / f"{number}.png")


def test_a_file_that_describes_itself(command, tmp_path):
    make_folder(tmp_path / "images")
    torch.manual_seed(0)
    save(repkern.create_model("resnet18", num_classes=2, width=0.25), tmp_path / "net.safetensors")
    code, out, _ = command("eval", "net.safetensors", "--data", "images", "-s", "data.image_size=32", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["images"], found["classes"]) == (6, 2)
    code, _, err = command("eval", "net.safetensors")
    assert (code, "say on which images: --data FOLDER, or --recipe NAME" in err) == (2, True)
    make_folder(tmp_path / "three", classes=("a", "b", "c"))
    code, _, err = command("eval", "net.safetensors", "--data", "three", "-s", "data.image_size=32")
    assert (code, "the network has 2 outputs, but the data has 3 classes" in err) == (1, True)


def test_a_file_that_needs_a_name(command, tmp_path):
    make_folder(tmp_path / "images")
    model = repkern.create_model("repvgg_a0", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    words = ("eval", "net.pth", "--data", "images", "-s", "data.image_size=32")
    code, _, err = command(*words)
    assert (code, "add --model NAME" in err) == (2, True)
    code, out, _ = command(*words, "--model", "repvgg_a0", "--json")
    assert (code, json.loads(out)["images"]) == (0, 6)
    code, _, err = command(*words, "--model", "resnet18")
    assert (code, "fits resnet18 with none of the blocks" in err) == (1, True)


def test_a_network_of_the_quickstart(command, tmp_path):
    save_digits_net(DigitsNet((8,), 1), tmp_path / "plain.safetensors")
    code, out, _ = command("eval", "plain.safetensors", "--recipe", "digits_plain", "--json")
    assert (code, json.loads(out)["images"]) == (0, 355)


def test_weights_alone_point_to_their_run(command, trained):
    code, _, err = command("eval", str(trained / "plain" / "model.safetensors"), "--data", "x")
    assert code == 2
    assert f"give its run, {trained / 'plain'}" in err


def test_what_cannot_be_tested(command, trained, tmp_path):
    run = str(trained / "plain")
    (tmp_path / "empty").mkdir()
    for words, code, expected in (
        (["none"], 2, "there is no none"),
        (["empty"], 2, "empty is not a run"),
        ([run, "--model", "resnet18"], 2, "a run knows its network"),
        ([run, "--recipe", "nothing"], 2, "there is no recipe 'nothing'"),
        ([run, "-s", "data.nam=x"], 2, "did you mean data.name?"),
        ([run, "--data", "nowhere"], 1, "nowhere"),
    ):
        found, _, err = command("eval", *words)
        assert (found, expected in err) == (code, True), err
    shutil.copytree(run, tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "checkpoints").glob("*/weights.safetensors"):
        save_file({"x": torch.zeros(1)}, str(file))
    code, _, err = command("eval", "damaged")
    assert (code, "damaged" in err) == (1, True)
