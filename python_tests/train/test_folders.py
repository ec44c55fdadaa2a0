import numpy
import pytest
import torch

from repkern.train.data import DigitsData
from repkern.train.folders import FlippedBatches, load_image_folder, load_images

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path):
    """Two classes, told apart by their grey value, of several sizes and modes."""
    for part, count in (("train", 3), ("test", 2)):
        for name, value in (("cat", 0), ("dog", 255)):
            (tmp_path / part / name).mkdir(parents=True)
            for at in range(count):
                pixels = numpy.full((8 + at, 8), value, dtype=numpy.uint8)
                Image.fromarray(pixels).convert("L" if at else "RGB").save(tmp_path / part / name / f"{at}.png")
    return tmp_path


def test_images_labels_and_range(folder):
    data = load_image_folder(folder, 16)
    assert data.train_images.shape == (6, 3, 16, 16)
    assert data.test_images.shape == (4, 3, 16, 16)
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.train_images[:3] == -1).all()
    assert (data.train_images[3:] == 1).all()


def test_val_serves_as_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(load_image_folder(folder).test_labels) == 4


def test_images_of_the_right_size_are_not_touched(tmp_path):
    pixels = torch.arange(3 * 64, dtype=torch.uint8).reshape(8, 8, 3)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(pixels.numpy()).save(tmp_path / part / name / "x.png")
    data = load_image_folder(tmp_path, 8)
    torch.testing.assert_close(data.train_images[0], pixels.permute(2, 0, 1).float() / 127.5 - 1)


def test_bad_folders(folder):
    with pytest.raises(FileNotFoundError, match="train and test"):
        load_image_folder(folder / "nowhere")
    (folder / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match="bird"):
        load_image_folder(folder)
    (folder / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"bird has no images"):
        load_image_folder(folder)
    (folder / "train" / "bird" / "x.png").write_text("no image")
    with pytest.raises(ValueError, match=r"x\.png is no readable image"):
        load_image_folder(folder)


def test_one_class_is_too_few(folder):
    for part in ("train", "test"):
        for path in (folder / part / "dog").iterdir():
            path.unlink()
        (folder / part / "dog").rmdir()
    with pytest.raises(ValueError, match="two classes, got 1"):
        load_image_folder(folder)


def test_some_images_are_mirrored_and_the_order_resumes():
    images = torch.zeros(64, 1, 4, 4)
    images[:, :, :, 0] = 1
    data = DigitsData(images, torch.arange(64), images, torch.arange(64))
    source = FlippedBatches(data, 32, seed=1)
    batches = list(source.train_batches())
    mirrored = sum(int(batch[:, 0, 0, 3].sum()) for batch, _ in batches)
    assert 10 < mirrored < 54
    state = source.state_dict()
    after = [batch for batch, _ in source.train_batches()]
    other = FlippedBatches(data, 32, seed=5)
    other.load_state_dict(state)
    for one, two in zip(after, other.train_batches(), strict=True):
        assert torch.equal(one, two[0])


def test_a_sample_of_images_in_any_folders(folder):
    pixels = load_images(folder, 5, 16)
    assert pixels.shape == (5, 3, 16, 16)
    assert sorted(pixels.mean(dim=(1, 2, 3)).tolist()) == [0, 0, 0, 1, 1]  # 10 files: test, then train, cats first
    assert len(load_images(folder, 100, 16)) == 10
    assert load_images(folder, 2, 16, channels=1).shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match="channels, the network takes 4"):
        load_images(folder, 2, 16, channels=4)
