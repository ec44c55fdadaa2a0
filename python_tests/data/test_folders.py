"""Image folders: classes and files in order, what is no image left out, and clear errors."""

import os
import shutil

import numpy
import pytest
import torch

from repkern.data import DataRecipe, ImageSizeError, load_images, open_data, open_folder
from repkern.data.folders import FileData

Image = pytest.importorskip("PIL.Image")


def open_source(folder, **options):
    recipe = {"name": "folder", "root": str(folder), "mean": (0, 0, 0), "std": (1, 1, 1)} | options
    return open_data(DataRecipe(**recipe), batch_size=4, seed=0)


def test_classes_and_files_in_the_order_of_their_names(make_folder):
    folder = make_folder(count=11)
    train, test = open_folder(folder)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0] * 11 + [1] * 11
    names = [train.path(number).relative_to(folder).as_posix() for number in range(3)]
    assert names == ["train/cat/0.png", "train/cat/1.png", "train/cat/10.png"]
    assert len(test) == 6


def test_links_are_followed_but_not_in_circles(make_folder, tmp_path):
    folder = make_folder()
    cats, other = folder / "train" / "cat", tmp_path / "other"
    before = len(open_folder(folder)[0])
    other.mkdir()
    shutil.copy(cats / "0.png", other / "more.png")
    (cats / "itself").symlink_to(cats, target_is_directory=True)
    (cats / "other").symlink_to(other, target_is_directory=True)
    (other / "back").symlink_to(cats, target_is_directory=True)
    (cats / ".thumbnails").mkdir()
    shutil.copy(cats / "0.png", cats / ".thumbnails" / "0.png")
    train, _ = open_folder(folder)
    assert len(train) == before + 1
    assert any(train.name_of(n).endswith(os.path.join("other", "more.png")) for n in range(len(train)))


def test_other_files_are_left_out_and_folders_within_classes_are_searched(make_folder):
    folder = make_folder()
    (folder / "train" / "cat" / "notes.txt").write_text("cats")
    (folder / "train" / "cat" / "._0.png").write_text("what another system leaves behind")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "dog" / "small").mkdir()
    shutil.copy(folder / "train" / "dog" / "0.png", folder / "train" / "dog" / "small" / "Ü.PNG")
    train, _ = open_folder(folder)
    assert len(train) == 17
    assert train.name_of(16).endswith(os.path.join("dog", "small", "Ü.PNG"))
    with train.open(16) as image:
        assert image.size == (10, 12)


def test_val_and_validation_serve_as_test(make_folder):
    folder = make_folder()
    (folder / "test").rename(folder / "val")
    assert len(open_folder(folder)[1]) == 6
    (folder / "val").rename(folder / "validation")
    assert len(open_folder(folder)[1]) == 6


def test_bad_folders_are_named(make_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        open_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty needs the folders train and test .* it has nothing"):
        open_folder(tmp_path / "empty")
    folder = make_folder()
    (folder / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match="must have the same classes, they differ in bird"):
        open_folder(folder)
    (folder / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"bird has no images \(.png"):
        open_folder(folder)
    for part in ("train", "test"):
        for name in ("bird", "dog"):
            shutil.rmtree(folder / part / name)
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        open_folder(folder)
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "cat")
    with pytest.raises(ValueError, match="at least two classes, got 0"):
        open_folder(folder)
    with pytest.raises(ValueError, match="has no images"):
        FileData(folder, [], torch.zeros(0, dtype=torch.int64), ["cat"])


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_images_in_memory_or_read_each_time_are_the_same(make_folder, memory):
    folder = make_folder()
    source = open_source(folder, image_size=10, memory=memory)
    images, labels = zip(*source.train_batches(0), strict=True)
    images, labels = torch.cat(images), torch.cat(labels)
    assert images.shape == (16, 3, 10, 10)
    values = (images[:, 0, 0, 0] * 255).round().long()
    assert sorted(values.tolist()) == sorted(5 * n for n in range(8)) + sorted(100 + 5 * n for n in range(8))
    assert torch.equal(labels, values // 100)
    assert source.image_size == 10
    assert source.describe() == open_source(folder, image_size=10, memory=1 - memory).describe()


def test_fewer_images_than_a_batch_name_the_folder(make_folder):
    folder = make_folder(count=1)
    with pytest.raises(ValueError, match=r"number of training images of .*photos, 2, got 4"):
        open_source(folder)


def test_their_own_size_or_a_clear_error(make_folder):
    folder = make_folder(size=(6, 6))
    source = open_source(folder)
    assert source.image_size == 6
    assert next(source.train_batches(0)).images.shape == (4, 3, 6, 6)
    Image.fromarray(numpy.zeros((7, 9, 3), numpy.uint8)).save(folder / "train" / "cat" / "0.png")
    with pytest.raises(ImageSizeError, match=r"different sizes, .*9x7.*give data\.image_size"):
        list(open_source(folder).train_batches(0))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on machines of fewer cores
def test_random_crops_are_the_same_with_any_number_of_workers(make_folder, no_process_is_left):
    folder = make_folder(size=(40, 60), suffix=".jpg")
    found = []
    for workers in (0, 1, 2):
        source = open_source(folder, image_size=8, crop_scale=(0.1, 0.8), workers=workers)
        found.append(torch.cat([batch.images for epoch in (0, 1) for batch in source.train_batches(epoch)]))
        source.close()
    assert found[0].shape == (32, 3, 8, 8)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    source = open_source(folder, image_size=8, crop_scale=(0.1, 0.8))
    rest = torch.cat([batch.images for batch in source.train_batches(1, 2)])
    assert torch.equal(rest, found[0][24:])


def test_a_sample_of_images_in_any_folders(make_folder):
    folder = make_folder(count=8, tests=2)
    pixels = load_images(folder, 5, 16)
    assert pixels.shape == (5, 3, 16, 16)
    # Of 20 files every fourth: test/cat/0, train/cat/0, train/cat/4, train/dog/0, train/dog/4.
    assert (pixels[:, 0, 0, 0] * 255).round().tolist() == [0, 0, 20, 100, 120]
    assert len(load_images(folder, 100, 16)) == 20
    assert load_images(folder, 2, 16, channels=1).shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match="channels, the network takes 4"):
        load_images(folder, 2, 16, channels=4)
    (folder / "train" / "cat" / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"0\.png is no readable image"):
        load_images(folder, 100, 16)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images"):
        load_images(folder / "empty", 2, 16)
