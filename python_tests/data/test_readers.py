"""Digits, Fashion-MNIST and CIFAR: their files, the places they are looked for in, and files that are not whole."""

import gzip
import hashlib
import http.server
import io
import sys
import tarfile
import threading

import numpy
import pytest
import torch

from repkern.data import MissingExtraError, open_cifar, open_digits, open_fashion_mnist
from repkern.data import cifar as cifar_module
from repkern.data import idx as idx_module
from repkern.data.idx import FASHION_CLASSES, read_idx

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture
def digits():
    pytest.importorskip("sklearn")
    return open_digits()


def test_the_digits_are_complete_and_always_split_the_same_way(digits):
    from sklearn.datasets import load_digits

    train, test = digits
    assert (len(train), len(test)) == (1442, 355)
    assert train.images.shape == (1442, 1, 8, 8)
    assert torch.equal(train.images, open_digits()[0].images)
    share = torch.bincount(test.labels) / (torch.bincount(test.labels) + torch.bincount(train.labels))
    assert share.min() > 0.19
    assert share.max() <= 0.2
    ours = torch.cat([train.images, test.images]).flatten(1)
    every = torch.from_numpy(load_digits().images).to(torch.uint8).flatten(1)
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, every.tolist()))
    assert train.top == 16


def test_without_scikit_learn_the_text_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'repkern\[quickstart\]'"):
        open_digits()


def idx(values):
    head = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return head + values.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """Files like Fashion-MNIST's, 20 and 10 images of 5x4, and what is in them."""
    random = numpy.random.default_rng(0)
    folder = tmp_path / "fashion"
    folder.mkdir()
    values = [random.integers(0, 256, (20, 5, 4), dtype=numpy.uint8), numpy.arange(20, dtype=numpy.uint8) % 10,
              random.integers(0, 256, (10, 5, 4), dtype=numpy.uint8), numpy.arange(10, dtype=numpy.uint8)]  # fmt: skip
    for name, part in zip(NAMES, values, strict=True):
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(part)))
    return folder, values


def test_idx_files_compressed_or_not(fashion):
    folder, values = fashion
    for packed in (True, False):
        train, test = open_fashion_mnist(folder)
        assert torch.equal(train.images, torch.from_numpy(values[0])[:, None])
        assert torch.equal(test.images, torch.from_numpy(values[2])[:, None])
        assert train.labels.tolist() == values[1].tolist()
        assert train.classes == FASHION_CLASSES
        for name in NAMES if packed else ():
            path = folder / f"{name}.gz"
            (folder / name).write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()


def test_fashion_mnist_is_found_in_its_usual_places(fashion, monkeypatch, tmp_path):
    folder, _ = fashion
    monkeypatch.setattr(idx_module, "_DEBIAN", folder)
    assert len(open_fashion_mnist()[0]) == 20
    monkeypatch.setattr(idx_module, "_DEBIAN", tmp_path / "nowhere")
    monkeypatch.setenv("REPKERN_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"train-images.* not found in .*nowhere or .*cache.*data.download"):
        open_fashion_mnist()
    (tmp_path / "cache" / "data").mkdir(parents=True)
    folder.rename(tmp_path / "cache" / "data" / "fashion-mnist")
    assert len(open_fashion_mnist()[1]) == 10


def test_damaged_idx_files_are_named(fashion):
    folder, values = fashion
    path = folder / f"{NAMES[0]}.gz"
    whole = path.read_bytes()
    for content, text in (
        (whole[:-20], "is damaged"),
        (b"<html>", "is damaged"),
        (gzip.compress(idx(values[1])), "no IDX file of bytes in 3 dimensions, it starts with 00000801"),
        (gzip.compress(idx(values[0])[:-7]), r"400 values for its shape \[20, 5, 4\], got 393"),
        (gzip.compress(idx(values[2])), r"labels must be \[10\], one an image, got \[20\]"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            open_fashion_mnist(folder)
    (folder / "plain").write_bytes(b"")
    with pytest.raises(ValueError, match="plain is no IDX file"):
        read_idx(folder / "plain", 1)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, and the address that a server in this process gives it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    handler = lambda *arguments: Quiet(*arguments, directory=str(folder))  # noqa: E731
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_fashion_mnist_is_downloaded_only_when_asked_and_checked(fashion, served, monkeypatch, tmp_path):
    source, _ = fashion
    folder, address = served
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    target = tmp_path / "target"
    monkeypatch.setattr(idx_module, "_URL", address)
    sums = {name: hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest() for name in NAMES}
    with pytest.raises(FileNotFoundError):
        open_fashion_mnist(target)
    with pytest.raises(ValueError, match=r"train-images.* md5 sum .*incomplete or changed"):
        open_fashion_mnist(target, fetch=True)
    assert list(target.iterdir()) == []
    monkeypatch.setattr(idx_module, "_SUMS", sums)
    assert len(open_fashion_mnist(target, fetch=True)[0]) == 20
    assert sorted(path.name for path in target.iterdir()) == sorted(f"{name}.gz" for name in NAMES)
    (folder / f"{NAMES[3]}.gz").unlink()
    with pytest.raises(OSError, match=r"t10k-labels.* could not be downloaded to .*404"):
        open_fashion_mnist(tmp_path / "other", fetch=True)


def records(count, label_bytes, classes, seed):
    random = numpy.random.default_rng(seed)
    found = random.integers(0, 256, (count, label_bytes + 3072), dtype=numpy.uint8)
    found[:, label_bytes - 1] = numpy.arange(count) % classes
    return found


@pytest.fixture(params=[10, 100])
def cifar(request, tmp_path):
    """A folder like the archive's, in binary form, with what is in it."""
    kind = cifar_module._KINDS[request.param]
    folder = tmp_path / "cifar" / kind.folder
    folder.mkdir(parents=True)
    parts = [records(4, kind.label_bytes, kind.classes, seed) for seed in range(len(kind.train) + 1)]
    for name, part in zip([*kind.train, kind.test], parts, strict=True):
        (folder / name).write_bytes(part.tobytes())
    (folder / kind.names).write_text("\n".join(f"class_{number}" for number in range(kind.classes)) + "\n\n")
    return kind, folder, numpy.concatenate(parts[:-1]), parts[-1]


def packed(kind, folder):
    path = folder.parent / kind.archive
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, kind.folder)
    return path


def test_cifar_as_a_folder_or_as_its_archive(cifar):
    kind, folder, train, test = cifar
    archive = packed(kind, folder)
    for root in (folder, folder.parent, archive):
        ours, others = open_cifar(kind.classes, root)
        assert torch.equal(ours.images, torch.from_numpy(train[:, kind.label_bytes :].copy()).reshape(-1, 3, 32, 32))
        assert ours.labels.tolist() == train[:, kind.label_bytes - 1].tolist()
        assert others.labels.tolist() == test[:, kind.label_bytes - 1].tolist()
        assert ours.classes == tuple(f"class_{number}" for number in range(kind.classes))


def test_cifar_that_is_not_whole(cifar):
    kind, folder, train, _ = cifar
    archive = packed(kind, folder)
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged, or no archive"):
        open_cifar(kind.classes, archive)
    archive.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged, or no archive"):
        open_cifar(kind.classes, archive)
    (folder / kind.train[0]).write_bytes(train.tobytes()[:-1])
    with pytest.raises(ValueError, match=rf"{kind.train[0]} should be records of {kind.label_bytes + 3072} bytes"):
        open_cifar(kind.classes, folder)
    with pytest.raises(ValueError, match="should be records"):
        open_cifar(kind.classes, packed(kind, folder))
    if kind.classes == 10:
        bad = train.copy()
        bad[:, 0] = 10
        (folder / kind.train[0]).write_bytes(bad.tobytes())
        with pytest.raises(ValueError, match=r"labels must be in \[0, 10\)"):
            open_cifar(kind.classes, folder)
    (folder / kind.train[0]).unlink()
    with pytest.raises(FileNotFoundError, match=f"but lacks {kind.train[0]}"):
        open_cifar(kind.classes, folder)
    with pytest.raises(ValueError, match=f"but lacks {kind.train[0]}"):
        open_cifar(kind.classes, packed(kind, folder))


def test_cifar_that_is_not_there_or_pickled(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10: neither cifar-10-binary.tar.gz nor .*data.download"):
        open_cifar(10, tmp_path)
    for name, classes in (("cifar-10-batches-py", 10), ("cifar-10-python.tar.gz", 10), ("cifar-100-python", 100)):
        (tmp_path / name).mkdir()
        with pytest.raises(FileNotFoundError, match=f"{name} holds pickles"):
            open_cifar(classes, tmp_path)
        (tmp_path / name).rmdir()


def test_cifar_is_downloaded_when_asked(cifar, served, monkeypatch, tmp_path):
    kind, folder, train, _ = cifar
    served_folder, address = served
    archive = packed(kind, folder).rename(served_folder / kind.archive)
    monkeypatch.setattr(cifar_module, "_URL", address)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(cifar_module._KINDS, kind.classes, kind._replace(md5=md5))
    assert len(open_cifar(kind.classes, tmp_path / "new", fetch=True)[0]) == len(train)
    assert (tmp_path / "new" / kind.archive).is_file()


def test_an_archive_is_read_without_unpacking_it(tmp_path):
    """Members with paths that leave the folder are only ever read into memory."""
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("../../evil.bin")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"evil"))
    with pytest.raises(ValueError, match=r"should hold CIFAR-10 in binary form, but lacks data_batch_1\.bin"):
        open_cifar(10, path)
    assert not list(tmp_path.parent.rglob("evil.bin"))
