"""Images that are missing or damaged: counted once, named, replaced or left out, and an error when too many."""

import re

import numpy
import pytest
import torch

from repkern.data import DamagedImagesError, DamagedImagesWarning, DataRecipe, open_data

pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(make_folder):
    """32 images to train on, of which one is cut off and one is gone later, and 12 to test on with one that is none."""
    folder = make_folder(count=16, tests=6, size=(24, 24), suffix=".jpg")
    path = folder / "train" / "cat" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    (folder / "test" / "dog" / "0.jpg").write_text("no image")
    return folder


def open_source(folder, **options):
    recipe = {"name": "folder", "root": str(folder), "image_size": 8, "damaged_share": 0.1, "memory": 0.0} | options
    source = open_data(DataRecipe(**recipe), batch_size=8, seed=0)
    (folder / "train" / "dog" / "7.jpg").unlink(missing_ok=True)
    return source


def joined(batches):
    batches = list(batches)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def read(source, epoch=0):
    with pytest.warns(DamagedImagesWarning):
        return joined(source.train_batches(epoch))


def test_others_take_their_places_in_training(folder):
    source = open_source(folder)
    with pytest.warns(DamagedImagesWarning, match="of 32 train images cannot be read: .*; others take") as caught:
        images, labels = joined(source.train_batches(0))
    assert images.shape == (32, 3, 8, 8)
    assert torch.bincount(labels).sum() == 32
    texts = " ".join(str(each.message) for each in caught)
    assert "3.jpg: " in texts
    assert "7.jpg: " in texts
    assert source.damaged() == {"train": 2, "test": 0}
    bright = images[:, 0].mean((1, 2)) * 0.229 + 0.485 > 0.3
    assert torch.equal(bright.long(), labels)  # a replacement comes with its own label


def test_they_are_left_out_of_the_test(folder):
    source = open_source(folder)
    with pytest.warns(DamagedImagesWarning, match=r"1 of 12 test images cannot be read: .*0\.jpg.*; they are left out"):
        images, labels = joined(source.test_batches())
    assert len(images) == 11
    assert torch.bincount(labels).tolist() == [6, 5]
    assert source.damaged() == {"train": 0, "test": 1}


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on machines of fewer cores
def test_replacements_are_functions_of_the_counter(folder, no_process_is_left):
    gone = (folder / "train" / "dog" / "7.jpg").read_bytes()
    found = []
    for workers in (0, 1, 2):
        (folder / "train" / "dog" / "7.jpg").write_bytes(gone)
        source = open_source(folder, workers=workers)
        found.append(read(source))
        source.close()
    for images, labels in found[1:]:
        assert torch.equal(images, found[0][0])
        assert torch.equal(labels, found[0][1])


def test_each_is_counted_and_reported_once(folder, recwarn):
    source = open_source(folder)
    for epoch in range(3):
        list(source.train_batches(epoch))
    counts = [int(re.match(r"(\d+) of 32", str(each.message))[1]) for each in recwarn]
    assert counts == sorted(set(counts))
    assert counts[-1] == 2


def test_too_many_are_an_error_that_names_the_first(folder):
    source = open_source(folder, damaged_share=0.05)
    with (
        pytest.warns(DamagedImagesWarning),
        pytest.raises(DamagedImagesError, match=r"2 of 32 .* at most 5\.00% may be"),
    ):
        joined(source.train_batches(0))
    for number in range(9):
        (folder / "train" / "cat" / f"{number}.jpg").write_text("no image")
    with pytest.raises(
        DamagedImagesError, match=r"of 31 train images .*\.jpg: .*\.jpg: .*\.jpg: .*; \.\.\.; at most 10"
    ):
        [joined(open_source(folder).train_batches(epoch)) for epoch in range(9)]


def test_none_may_be_damaged_on_request(folder):
    with pytest.raises(DamagedImagesError, match=r"1 of 32 .*\.jpg: .*; none may be \(on_error: fail\)"):
        joined(open_source(folder, on_error="fail").train_batches(0))
    with pytest.raises(DamagedImagesError, match=r"1 of 12 test images .*0\.jpg"):
        joined(open_source(folder, on_error="fail").test_batches())


def test_sets_in_memory_leave_them_out_at_once(folder):
    with pytest.warns(DamagedImagesWarning) as caught:
        source = open_source(folder, memory=1.0)
    assert len(caught) == 2
    assert source.steps_per_epoch == 3  # 31 images
    assert len(joined(source.test_batches())[0]) == 11
    with pytest.raises(DamagedImagesError, match="1 of 31 train images"):
        open_source(folder, memory=1.0, on_error="fail")


def test_all_damaged_is_an_error(folder):
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"")
    for memory in (0.0, 1.0):
        with pytest.raises(DamagedImagesError):
            list(open_source(folder, damaged_share=0.5, memory=memory).train_batches(0))
    with pytest.raises(ValueError, match="none of the first images can be read"):
        open_source(folder, image_size=0)


def test_damaged_metadata_do_not_make_a_damaged_image(folder):
    from PIL import Image

    path = folder / "test" / "dog" / "0.jpg"
    Image.fromarray(numpy.zeros((24, 24, 3), numpy.uint8)).save(path, exif=b"Exif\0\0nonsense")
    assert len(joined(open_source(folder, damaged_share=0.0).test_batches())[0]) == 12
