import sys

import pytest
import torch

from repkern.train.data import DigitsData, MissingExtraError, TensorBatches, load_digits, random_affine


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return load_digits()


def test_the_split_is_complete_stratified_and_always_the_same(digits):
    again = load_digits()
    assert all(torch.equal(a, b) for a, b in zip(digits, again, strict=True))
    assert len(digits.train_labels) == 1442
    assert len(digits.test_labels) == 355
    share = torch.bincount(digits.test_labels) / (
        torch.bincount(digits.test_labels) + torch.bincount(digits.train_labels)
    )
    assert share.min() > 0.19
    assert share.max() <= 0.2


def test_no_image_is_in_both_parts(digits):
    from sklearn.datasets import load_digits as load

    every = torch.from_numpy(load().images).float().div(8).sub(1).flatten(1)
    ours = torch.cat([digits.train_images, digits.test_images]).flatten(1)

    def in_order(rows):
        return sorted(map(tuple, rows.tolist()))

    assert in_order(ours) == in_order(every)
    assert digits.train_images.min() == -1
    assert digits.train_images.max() == 1


def test_without_scikit_learn_the_text_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'repkern\[quickstart\]'"):
        load_digits()


def test_augmentation_is_an_affine_map_within_its_limits():
    """The map that was drawn, read off an image whose values are the coordinates of its pixels."""
    size, count = 32, 200
    line = (torch.arange(size) + 0.5) * 8 / size - 4  # pixels of an 8x8 image, from its centre
    x, y = line.expand(size, size), line[:, None].expand(size, size)
    images = torch.stack([x, y]).expand(count, 2, size, size)
    out = random_affine(images, 1.0, torch.Generator().manual_seed(0))
    middle = slice(size // 2 - 6, size // 2 + 6)
    x, y, out = x[middle, middle], y[middle, middle], out[:, :, middle, middle]
    design = torch.stack([x.flatten(), y.flatten(), torch.ones(x.numel())], dim=1).double()
    maps = (torch.linalg.pinv(design) @ out.flatten(2).transpose(1, 2).double()).transpose(1, 2)
    assert (design @ maps.transpose(1, 2) - out.flatten(2).transpose(1, 2)).abs().max() < 1e-4
    scale = torch.linalg.det(maps[:, :, :2]).sqrt()
    angle = torch.rad2deg(torch.atan2(maps[:, 1, 0], maps[:, 0, 0]))
    for drawn, middle, most in (
        (scale, 1.0, 0.1),
        (angle, 0.0, 10.0),
        (maps[:, 0, 2], 0.0, 1.0),
        (maps[:, 1, 2], 0, 1),
    ):
        assert (drawn - middle).abs().max() <= most * 1.001
        assert drawn.min() < middle - 0.9 * most
        assert drawn.max() > middle + 0.9 * most


def test_no_augmentation_changes_nothing():
    images = torch.randn(3, 1, 8, 8)
    assert random_affine(images, 0.0, torch.Generator()) is images


def test_negative_strength_is_an_error():
    with pytest.raises(ValueError, match="strength must be zero or more, got -1"):
        random_affine(torch.zeros(1, 1, 8, 8), -1, torch.Generator())


def make_data(count=10):
    images = torch.arange(count, dtype=torch.float32).reshape(count, 1, 1, 1).expand(count, 1, 8, 8)
    return DigitsData(images, torch.arange(count), images[:3], torch.arange(3))


def test_an_epoch_is_a_permutation_without_the_rest():
    batches = TensorBatches(make_data(), 3, seed=0)
    assert batches.steps_per_epoch == 3
    labels = [label for _, part in batches.train_batches() for label in part.tolist()]
    assert len(set(labels)) == len(labels) == 9
    assert labels != [label for _, part in batches.train_batches() for label in part.tolist()]
    for images, part in batches.train_batches():
        assert torch.equal(images[:, 0, 0, 0].long(), part)


def test_order_and_augmentation_continue_from_a_saved_state():
    batches = TensorBatches(make_data(), 4, seed=1, augment=1.0)
    list(batches.train_batches())
    state = batches.state_dict()
    wanted = list(batches.train_batches())
    other = TensorBatches(make_data(), 4, seed=2, augment=1.0)
    other.load_state_dict(state)
    for (images, labels), (other_images, other_labels) in zip(wanted, other.train_batches(), strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_a_batch_larger_than_the_data_is_an_error():
    with pytest.raises(ValueError, match="batch_size must be at most 10, got 11"):
        TensorBatches(make_data(), 11, seed=0)
