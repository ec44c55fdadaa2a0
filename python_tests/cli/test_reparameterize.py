import json
import os
import pty
import subprocess
import sys

import pytest
import torch

from repkern.models import create_model, load, save


@pytest.fixture
def trained(tmp_path):
    """A small network of ours in the command's folder."""
    model = create_model("repvgg_a0", num_classes=5, width=0.25).requires_grad_(False)
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32))
    save(model.eval(), tmp_path / "in.safetensors")
    return model


@pytest.fixture
def foreign(tmp_path):
    """A checkpoint that does not say what it is."""
    model = create_model("repghostnet_050", num_classes=5)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "foreign.pth")
    return model


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_of_ours(command, trained, tmp_path, suffix):
    code, out, err = command("reparameterize", "in.safetensors", f"out.{suffix}", "--verify", "32")
    assert (code, err) == (0, "")
    x = torch.randn(1, 3, 32, 32)
    plain, wanted = load(tmp_path / f"out.{suffix}").requires_grad_(False), trained(x)
    assert float((plain(x) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    before, after = (sum(p.numel() for p in model.parameters()) for model in (trained, plain))
    lines = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    values = {name: text.strip() for name, text in lines.items()}
    assert values["network"] == "repvgg_a0, blocks repvgg (layout repkern)"
    assert values["converted"] == "22 blocks"
    assert values["parameters"] == f"{before:,} -> {after:,}"
    assert values["compared"] == "on 2 images 32x32"
    assert float(values["in float64"].split(",")[0]) <= 1e-12
    assert "of the largest value (bound " in values["largest difference"]
    assert values["worst block"].startswith("st")
    assert values["written"] == f"out.{suffix}"


def test_json_is_all_there_is_on_stdout(command, trained, tmp_path):
    code, out, err = command("reparameterize", "in.safetensors", "out.pth", "--verify", "32", "--batch", "3", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["model"] == "repvgg_a0"
    assert (found["image_size"], found["batch"]) == (32, 3)
    assert found["size_bytes"] == [(tmp_path / name).stat().st_size for name in ("in.safetensors", "out.pth")]
    worst = found["report"]["worst_output"]
    assert 0 < worst["absolute"] <= worst["bound"]
    assert worst["within_bound"] is True
    assert found["report"]["worst_block"]["kind"] == "RepVGGBlock"
    assert len(found["report"]["converted"]) == 22


def test_a_checkpoint_with_a_name_warns_about_statistics(command, foreign, tmp_path):
    code, out, err = command("reparameterize", "foreign.pth", "out.pth", "--model", "repghostnet_050", "--verify", "32")
    assert code == 0
    assert "repghostnet_050" in out
    assert err.startswith("Warning: these BatchNorms have never seen data")
    assert len(err.splitlines()) == 1
    assert load(tmp_path / "out.pth").config["num_classes"] == 5


def test_without_comparison_and_of_a_deployed_file(command, trained):
    code, out, _ = command("reparameterize", "in.safetensors", "out.pth", "--verify", "0")
    assert code == 0
    assert "not compared (--verify 0)" in out
    code, out, _ = command("reparameterize", "out.pth", "again.pth", "--verify", "16")
    assert code == 0
    assert "nothing: it was in deployed form" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["foreign.pth", "out.pth"], "foreign.pth does not say which network it holds: add --model NAME"),
        (["foreign.pth", "out.pth", "--model", "repvgg_a9"], "there is no model 'repvgg_a9'; near it: repvgg_a"),
        (["foreign.pth", "out.pth", "--model", "resnet18", "--block", "dbbb"], "got 'dbbb'"),
        (["foreign.pth", "out.onnx", "--model", "repghostnet_050"], "must end in .safetensors or .pth, got 'out.onnx'"),
        (["foreign.pth", "none/out.pth"], "the folder none does not exist"),
        (["foreign.pth", "foreign.pth"], "IN and OUT are the same file"),
        (["foreign.pth", "folder.pth"], "folder.pth is a folder"),
        (["none.pth", "out.pth"], "none.pth"),
        (["foreign.pth", "out.pth", "--verify", "-1"], "--verify"),
        (["foreign.pth", "out.pth", "--batch", "0"], "--batch"),
        (["foreign.pth", "out.pth", "--num-classes", "many"], "--num-classes"),
        (["foreign.pth"], "OUT"),
    ],
)
def test_wrong_use_is_exit_code_2(command, foreign, tmp_path, words, message):
    (tmp_path / "folder.pth").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = command("reparameterize", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_failures_are_exit_code_1_and_leave_what_was_there(command, trained, foreign, tmp_path):
    (tmp_path / "out.pth").write_text("old")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "foreign.pth").read_bytes()[:1000])
    for words, message in (
        (["cut.pth", "out.pth", "--model", "repghostnet_050"], "cut.pth is damaged"),
        (
            ["foreign.pth", "out.pth", "--model", "resnet18", "--block", "conv_bn"],
            "with none of the blocks conv_bn, plain",
        ),
        (["in.safetensors", "out.pth", "--model", "resnet18"], "but it holds 'repvgg_a0'"),
    ):
        code, _, err = command("reparameterize", *words)
        assert code == 1
        assert err.startswith("Error: ")
        assert message in err
    assert (tmp_path / "out.pth").read_text() == "old"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_ctrl_c_is_130(command, trained, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("repkern.deploy.convert.save", interrupt)
    code, _, err = command("reparameterize", "in.safetensors", "out.pth", "--verify", "16")
    assert code == 130
    assert "nothing was written" in err
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX terminals")
def test_on_a_terminal_there_is_a_spinner_and_then_the_table(trained, tmp_path):
    master, slave = pty.openpty()
    words = ["reparameterize", "in.safetensors", "out.pth", "--verify", "16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "repkern.cli.main", *words],
        cwd=tmp_path,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        text += part
    os.close(master)
    assert process.wait() == 0
    assert b"converting, and comparing" in text
    assert b"largest difference" in text.rsplit(b"\x1b[2K", 1)[-1]


def test_help_teaches(command):
    for name in ("reparameterize", "export", "models"):
        code, out, _ = command(name, "--help")
        assert code == 0
        assert "Examples" in out
        assert out.count(f"repkern {name}") >= 3
    code, out, _ = command("--help")
    assert all(name in out for name in ("reparameterize", "export", "models"))


def test_models_lists_what_the_papers_count(command):
    code, out, err = command("models", "repvgg_a[01]")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[1:] == [
        ["repvgg_a0", "repvgg", "9.11", "M", "8.31", "M", "1000"],
        ["repvgg_a1", "repvgg", "14.09", "M", "12.79", "M", "1000"],
    ]
    code, out, _ = command("models", "resnet18", "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert row["parameters"] == sum(p.numel() for p in create_model("resnet18").parameters())
    assert row["deployed_parameters"] == sum(p.numel() for p in create_model("resnet18", block="plain").parameters())
    code, out, err = command("models", "zzz")
    assert (code, out) == (2, "")
    assert "no network matches 'zzz'" in err
