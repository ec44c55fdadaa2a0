"""`repkern bench loader`: rows are valid, readers that differ are not timed, targets are those of the issue."""

import math

import pytest
import torch

from repkern.bench import loader, targets
from repkern.bench.loader import LoaderOptions, run_loader, write_photos
from repkern.data import open_folder

pytest.importorskip("PIL")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on machines of fewer cores
TINY = LoaderOptions(batch=4, steps=2, large=16, large_batch=2, large_batches=2, pairs=2, width=0.0625)


def ignore(text):
    pass


def test_every_comparison_has_a_row(no_process_is_left):
    rows, said = [], []
    assert run_loader(TINY, rows.append, said.append) == []
    assert [(row.case, row.what, row.backend, row.baseline) for row in rows] == [
        ("vgg16_cifar_b4_32", "step", "0 workers", "in memory"),
        ("vgg16_cifar_b4_32", "reading", "0 workers", "model"),
        ("vgg16_cifar_b4_32", "step", "1 workers", "in memory"),
        ("vgg16_cifar_b4_32", "reading", "1 workers", "model"),
        ("jpeg_16", "decoding", "2 workers", "1 worker"),
    ]
    for row in rows:
        assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
        assert math.isfinite(row.ratio)
    assert sum("images/s" in text for text in said) == 3
    assert str(targets.loader_target("step")) == "<= 1.03 x in memory"
    assert str(targets.loader_target("decoding")) == ">= 1.7 x 1 worker"


def test_readers_that_differ_are_not_timed(monkeypatch):
    real = loader.open_data

    def noisy(recipe, **options):
        source = real(recipe, **options)
        batches = source.train_batches
        if recipe.workers:
            source.train_batches = lambda epoch: (b._replace(images=b.images + 1e-6) for b in batches(epoch))
        return source

    monkeypatch.setattr(loader, "open_data", noisy)
    rows = []
    failures = run_loader(TINY, rows.append, ignore)
    assert failures == ["32 x 32: 1 workers give other images than none", *failures[1:]]
    assert len(failures) == 3
    assert rows == []


def test_photos_are_an_image_folder(tmp_path):
    write_photos(tmp_path / "photos", 6, (40, 30))
    train, test = open_folder(tmp_path / "photos")
    assert torch.bincount(train.labels).tolist() == [3, 3]
    assert len(test) == 4
    with train.open(0) as image:
        assert image.size == (40, 30)
