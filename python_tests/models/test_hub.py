"""save_pretrained, from_pretrained and push_to_hub, without a network."""

import json
import sys
from pathlib import Path

import pytest
import torch

import repkern
from repkern.models import Network, create_model, load

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def model():
    return create_model("repvgg_a0", num_classes=5, width=0.25).eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def uploads(monkeypatch):
    """What would be sent to the Hub."""
    sent = []

    class Repo:
        def __init__(self, repo_id):
            self.repo_id = repo_id

    def create_repo(self, repo_id, **options):
        sent.append(("create", repo_id, options))
        return Repo(f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, *, repo_id, folder_path, **options):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        sent.append(("upload", repo_id, {**options, "files": files}))
        return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    return sent


@pytest.mark.parametrize("deployed", [False, True])
def test_a_folder_round_trip(model, x, tmp_path, deployed):
    if deployed:
        with pytest.warns(UserWarning, match="never seen data"):
            model = repkern.reparameterize(model)
    assert model.save_pretrained(tmp_path / "folder") is None
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    for back in (Network.from_pretrained(tmp_path / "folder"), type(model).from_pretrained(str(tmp_path / "folder"))):
        assert type(back) is type(model)
        assert not back.training
        assert torch.equal(back(x), model(x))
    assert torch.equal(load(tmp_path / "folder" / "model.safetensors")(x), model(x))
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["model_name"], config["form"]) == ("repvgg_a0", "deployed" if deployed else "training")
    assert config["config"]["num_classes"] == 5


def test_the_class_is_checked(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = type(create_model("resnet18", width=0.25))
    with pytest.raises(TypeError, match=f"holds a {type(model).__name__}, not a {other.__name__}"):
        other.from_pretrained(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        Network.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [Path, str])
def test_a_path_without_a_folder_is_an_error_before_the_hub_is_asked(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=r"no folder at .*absent"):
        Network.from_pretrained(kind(tmp_path / "absent"))


def test_the_card_says_what_is_known_and_a_written_one_stays(model, tmp_path):
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    card = hub.ModelCard(text)
    assert card.data.library_name == "repkern"
    assert "image-classification" in card.data.tags
    assert "`repkern.create_model('repvgg_a0', block='repvgg', num_classes=5, width=0.25)`" in text
    assert "In training form: blocks of the kind `repvgg`" in text
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_push_to_hub_sends_one_commit(model, x, uploads, tmp_path):
    url = model.push_to_hub("me/net", private=True, commit_message="first")
    assert url == "https://hub/me/net/commit/1"
    (_, _, created), (_, repo_id, sent) = uploads
    assert created["private"] is True
    assert repo_id == "me/net"
    assert sent["commit_message"] == "first"
    assert set(sent["files"]) == {"model.safetensors", "config.json", "README.md"}
    assert b'Network.from_pretrained("me/net")' in sent["files"]["README.md"]
    (tmp_path / "model.safetensors").write_bytes(sent["files"]["model.safetensors"])
    assert torch.equal(load(tmp_path / "model.safetensors")(x), model(x))


def test_saving_and_pushing_in_one_call(model, uploads, tmp_path):
    assert model.save_pretrained(tmp_path / "net", push_to_hub=True, repo_id="me/net").endswith("commit/1")
    assert [kind for kind, _, _ in uploads] == ["create", "upload"]
    with pytest.raises(TypeError, match="private: only with push_to_hub=True"):
        model.save_pretrained(tmp_path / "net", private=True)


def test_a_repository_is_downloaded_with_the_given_revision(model, x, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options["revision"], options["local_files_only"]))
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda repo_id, **o: download(repo_id, **o))
    back = Network.from_pretrained("me/net", revision="v1", local_files_only=True)
    assert torch.equal(back(x), model(x))
    assert ("me/net", "model.safetensors", "v1", True) in asked


def test_without_the_package_the_error_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (
        lambda: model.save_pretrained(tmp_path),
        lambda: Network.from_pretrained(tmp_path),
        lambda: model.push_to_hub("me/net"),
    ):
        with pytest.raises(ImportError, match=r"pip install 'repkern\[hub\]'.*repkern\.models\.save"):
            call()
    assert list(tmp_path.iterdir()) == []
