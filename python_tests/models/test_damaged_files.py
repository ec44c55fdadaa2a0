"""Files that are damaged, hostile or cannot be written: a clear error, and nothing that was saved before is lost."""

import json
import os
import sys
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from repkern import load_checkpoint
from repkern.models import create_model, load, save
from repkern.models.checkpoints.reading import read_checkpoint
from repkern.models.files import parse_json, replaced
from repkern.models.saving import read_description
from repkern.models.seal import check_seal, notes_of, sealed
from repkern.models.zip_sums import check_archive, seal_archive
from repkern.optim import load_scales


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("repvgg_a0", num_classes=5, width=0.25).eval().requires_grad_(False)


def flipped(content, place, bit):
    data = bytearray(content)
    data[place] ^= 1 << bit
    return bytes(data)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_no_flipped_bit_changes_a_network_unseen(tmp_path, model, suffix):
    path = tmp_path / f"model.{suffix}"
    save(model, path)
    content = path.read_bytes()
    wanted = model.state_dict()
    places = torch.randint(len(content), (60,), generator=torch.Generator().manual_seed(1)).tolist()
    refused = 0
    for at, place in enumerate([*places, *range(0, 2000, 61)]):
        path.write_bytes(flipped(content, place, at % 8))
        try:
            found = load(path).state_dict()
        except ValueError:
            refused += 1
            continue
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), f"bit {at % 8} of {place}"
    assert refused > 40  # the rest are zip headers that nothing depends on


def with_metadata(path, change, seal=True):
    """The same tensors, the metadata changed; seal: with sums that fit."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
        notes = notes_of(file.metadata()["repkern"])
    notes = change(notes)
    save_file(tensors, str(path), metadata={"repkern": sealed(notes, tensors) if seal else json.dumps(notes)})


def test_older_files_without_sums_still_load(tmp_path, model):
    save(model, tmp_path / "a.safetensors")
    with_metadata(tmp_path / "a.safetensors", lambda notes: notes, seal=False)
    assert all(map(torch.equal, load(tmp_path / "a.safetensors").state_dict().values(), model.state_dict().values()))


def config(**more):
    return lambda notes: {**notes, "config": {**notes["config"], **more}}


@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(checkpoint="/etc/hostname"), "config holds 'checkpoint'"),
        (config(name="resnet18"), "config holds 'name'"),
        (config(num_classes="5"), "num_classes must be int, got str"),
        (config(features_only=1), "features_only must be bool, got int"),
        (config(width=True), "width must be int or float, got bool"),
        (config(block_options=[1]), "block_options must be dict or NoneType, got list"),
        (config(num_classes=10**15), "holds the number"),
        (config(width=float("nan")), "holds the number nan"),
        (config(width=900.0), "describes a network of"),
        (lambda notes: {**notes, "changes": [1]}, "changes must be dict, got list"),
        (lambda notes: {**notes, "format": True}, "format must be int, got bool"),
        (lambda notes: {**notes, "chekpoint": 1}, "it has chekpoint, which no version"),
        (lambda notes: {name: value for name, value in notes.items() if name != "config"}, "it has no config"),
        (lambda notes: {**notes, "changes": {"forward": {"class": None}}}, "no such module"),
        (
            lambda notes: {**notes, "changes": {"head": {"class": "torch.nn.Sequential", "children": {"a": 1}}}},
            "children must be a list",
        ),
        (
            lambda notes: {**notes, "changes": {"head": {"class": "torch.nn.Linear", "arguments": [1]}}},
            "arguments must be a dictionary",
        ),
        (
            lambda notes: {
                **notes,
                "changes": {
                    "head": {
                        "class": "torch.nn.Linear",
                        "arguments": {"in_features": 10**6, "out_features": 10**6},
                    }
                },
            },
            "describes a network of",
        ),
    ],
)
def test_metadata_is_what_we_write_or_an_error(tmp_path, model, change, message, seal):
    save(model, tmp_path / "a.safetensors")
    with_metadata(tmp_path / "a.safetensors", change, seal)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.safetensors")


def test_changed_metadata_without_new_sums_is_an_error(tmp_path, model):
    save(model, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content.count(b'\\"torch\\": \\"2') == 1
    (tmp_path / "a.safetensors").write_bytes(content.replace(b'\\"torch\\": \\"2', b'\\"torch\\": \\"3'))
    with pytest.raises(ValueError, match=r"metadata .* SHA-256"):
        read_description(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "[1]", "null", "nonsense", 3, None])
def test_metadata_that_is_no_object_is_an_error(tmp_path, text):
    with pytest.raises(ValueError):
        notes_of(text)
    if isinstance(text, str):
        save_file({"a": torch.zeros(1)}, str(tmp_path / "a.safetensors"), metadata={"repkern": text})
        for read in (load, read_description, load_checkpoint):
            with pytest.raises(ValueError, match=r"a\.safetensors"):
                read(tmp_path / "a.safetensors")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "repkern": text}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth"):
        load(tmp_path / "a.pth")


def test_the_sums_cover_names_dtypes_shapes_and_bytes():
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2, 2)}
    text = sealed({"x": 1}, tensors)
    check_seal(text, dict(reversed(tensors.items())))
    for other in (
        {"a": tensors["a"]},
        {"a": tensors["a"], "c": tensors["b"]},
        {**tensors, "b": tensors["b"].flatten()},
        {**tensors, "b": tensors["b"].view(torch.int32)},
        {**tensors, "a": tensors["a"] + 1},
        {**tensors, "b": -tensors["b"]},
    ):
        with pytest.raises(ValueError, match="tensors are not those"):
            check_seal(text, other)
    with pytest.raises(ValueError, match="metadata is not what"):
        check_seal(text.replace('"x": 1', '"x": 2'), tensors)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8, torch.int64])
def test_weights_of_other_dtypes_are_refused_with_the_name(tmp_path, dtype):
    model = create_model("repvgg_a0", num_classes=5, width=0.25)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {**model.state_dict(), "head.weight": model.head.weight.detach().to(dtype)}
    save(model, tmp_path / "a.safetensors")
    description = json.dumps(read_description(tmp_path / "a.safetensors"))
    torch.save({"state_dict": tensors, "repkern": description}, tmp_path / "a.pth")
    text = rf"head\.weight.*{str(dtype).removeprefix('torch.')}"
    with pytest.raises(ValueError, match=text):
        load(tmp_path / "a.pth")
    for strict in (True, False):
        with pytest.raises(ValueError, match=text):
            load_checkpoint(tensors, model, strict=strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dictionaries_in_themselves_and_deep_ones_end(tmp_path):
    inside = {"state_dict": None, "epoch": 1}
    inside["state_dict"] = inside
    torch.save(inside, tmp_path / "loop.pth")
    deep = {"weight": torch.ones(1)}
    for _ in range(40):
        deep = {"model": deep, "epoch": 1}
    for opened in (load, read_description, load_checkpoint):
        with pytest.raises(ValueError, match="contains itself"):
            opened(tmp_path / "loop.pth")
    with pytest.raises(ValueError, match="more than 32 wrappers"):
        load_checkpoint(deep)


def test_many_prefixes_come_off():
    name = "module." * 3000
    tensors = {f"{name}a.weight": torch.ones(1), f"{name}module.b": torch.ones(1)}
    assert list(read_checkpoint(tensors).tensors) == ["a.weight", "module.b"]
    mixed = {"module._orig_mod.a": torch.ones(1), "module._orig_mod.module.b": torch.ones(1)}
    assert list(read_checkpoint(mixed).tensors) == ["a", "module.b"]
    apart = {"module.a": torch.ones(1), "modular.b": torch.ones(1)}
    assert list(read_checkpoint(apart).tensors) == list(apart)


@pytest.mark.parametrize(
    "content", [b"", b".", b"\x80", b"a,b\n1,2\n", b"0" * 50, b"PK\x03\x04", b"\x80\x02.", b"(lp0\n.", b"]" * 9]
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_content_is_a_value_error(tmp_path, content, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    for opened in (load, read_description, load_checkpoint, load_scales):
        with pytest.raises(ValueError, match=r"a\.(pth|safetensors)"):
            opened(path)


def test_a_huge_header_is_a_value_error(tmp_path):
    for size in (2**63 - 1, 2**40, 99_999_999):
        (tmp_path / "a.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match="damaged"):
            load(tmp_path / "a.safetensors")


def test_sums_of_foreign_pth_files_are_checked(tmp_path):
    path = tmp_path / "a.pth"
    tensors = {"a": torch.randn(100), "b": torch.randn(100)}
    torch.save(tensors, path)
    content = path.read_bytes()
    place = content.index(tensors["b"].numpy().tobytes())
    path.write_bytes(flipped(content, place + 7, 3))
    with pytest.raises(ValueError, match=r"CRC-32 sum of a/data/1"):
        load_checkpoint(path)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load_checkpoint(path)["a"], tensors["a"])  # written without sums
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_checkpoint(path)["b"], tensors["b"])


def test_names_that_just_fit_and_longer_ones(tmp_path, model):
    longest = tmp_path / ("a" * 251 + ".pth")
    save(model, longest)
    assert [path.name for path in tmp_path.iterdir()] == [longest.name]
    with pytest.raises(OSError, match="too long for this file system: choose a shorter one"):
        save(model, tmp_path / ("a" * 252 + ".pth"))
    with pytest.raises(ValueError, match="zero byte"):
        save(model, tmp_path / "a\0.pth")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_folder_where_a_file_is_wanted(tmp_path, model, suffix):
    (tmp_path / f"a.{suffix}").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder, a file name is needed"):
        save(model, tmp_path / f"a.{suffix}")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        save(model, tmp_path / "file" / f"a.{suffix}")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_full_disk_loses_nothing(tmp_path, suffix, run_python):
    """A limit on the size of files stands for it: writes fail in the middle, as they do there."""
    path = tmp_path / f"a.{suffix}"
    script = f"""
import resource, signal, repkern
from repkern.models import create_model, save, load
small = create_model("repvgg_a0", num_classes=5, width=0.25).eval()
save(small, {str(path)!r})
before = open({str(path)!r}, "rb").read()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    save(small, {str(path)!r})
except OSError as problem:
    print(type(problem).__name__, problem)
assert open({str(path)!r}, "rb").read() == before
load({str(path)!r})
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout
    assert "What was there before is kept" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() == 0, reason="needs a user whom permissions hold back")
def test_a_read_only_folder_is_said(tmp_path, model):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="no permission: write elsewhere"):
            save(model, tmp_path / "a.pth")
    finally:
        tmp_path.chmod(0o700)


def test_errors_of_the_file_system_say_what_to_do(tmp_path):
    """Whatever the system reports while a file is written, and nothing else."""

    def write(problem):
        with replaced(tmp_path / "a.txt"):
            raise problem

    with pytest.raises(OSError, match=r"\[Errno 28\] .*a\.txt cannot be written: the disk is full: make room"):
        write(OSError(28, "No space left on device"))
    with pytest.raises(PermissionError, match="no permission"):
        write(PermissionError(13, "Permission denied"))
    with pytest.raises(OSError, match="read-only: write elsewhere"):
        write(OSError(30, "Read-only file system"))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        write(RuntimeError("something else"))


def test_json_errors_are_value_errors():
    assert parse_json('{"a": [1, null]}') == {"a": [1, None]}
    for text in ("[" * 100_000, "{", b"\xff\xfe", '"\\ud800' + "x" * 10):
        with pytest.raises(ValueError):
            parse_json(text)


def test_the_sum_of_a_whole_archive(tmp_path):
    path = tmp_path / "a.pt2"
    torch.save({"a": torch.arange(50.0)}, path)
    check_archive(path)  # older files have no sum of ours
    seal_archive(path)
    content = path.read_bytes()
    check_archive(path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.arange(50.0))
    for place in range(len(content)):
        path.write_bytes(flipped(content, place, place % 8))
        with pytest.raises(ValueError):
            check_archive(path)
    for end in (0, 1, 100, len(content) - 1, len(content) - 79):
        path.write_bytes(content[:end])
        with pytest.raises((ValueError, zipfile.BadZipFile)):
            check_archive(path)
