"""From a recipe to its source: defaults of each data set, limits, and what does not fit."""

import json

import pytest
import torch

from repkern.data import DataRecipe, open_data

pytest.importorskip("sklearn")


def joined(batches):
    batches = list(batches)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def test_digits_as_the_default_recipe_has_them():
    source = open_data(DataRecipe(), batch_size=64, seed=0)
    assert (source.channels, source.image_size, source.batch_size, source.steps_per_epoch) == (1, 8, 64, 22)
    assert list(source.classes) == [str(digit) for digit in range(10)]
    images, labels = joined(source.train_batches(0))
    assert images.min() == -1
    assert images.max() == 1
    assert set(labels.tolist()) == set(range(10))
    json.dumps(source.describe())


def test_a_smaller_limit_takes_some_of_the_images_of_a_larger_one():
    def images(**limits):
        source = open_data(DataRecipe(**limits), batch_size=10, seed=0)
        return {tuple(row) for row in joined(source.train_batches(0))[0].flatten(1).tolist()}, source

    few, source = images(limit=50, test_limit=30)
    more, _ = images(limit=200)
    assert few < more
    assert len(few) == 50
    assert len(joined(source.test_batches())[1]) == 30
    with pytest.raises(ValueError, match=r"limit must be at most the number of images, 1442, got 2000"):
        images(limit=2000)
    with pytest.raises(ValueError, match=r"test_limit must be at most the number of images, 355, got 400"):
        images(test_limit=400)


def test_augmentation_and_mixing_of_the_recipe():
    recipe = DataRecipe(augment=({"name": "flip"},), mix={"mixup": 0.4})
    images, labels = next(open_data(recipe, batch_size=16, seed=0).train_batches(0))
    plain, whole = next(open_data(DataRecipe(), batch_size=16, seed=0).train_batches(0))
    assert labels.shape == (16, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(16))
    assert not torch.equal(images, plain)
    assert whole.dtype == torch.int64
    only = open_data(DataRecipe(augment=({"name": "flip"},)), batch_size=16, seed=0)
    images = next(only.train_batches(0)).images
    flipped = [torch.equal(a, b.flip(2)) for a, b in zip(images, plain, strict=True)]
    assert 0 < sum(flipped) < 16
    assert all(turned or torch.equal(a, b) for turned, a, b in zip(flipped, images, plain, strict=True))


def test_sets_in_memory_are_resized_and_cropped_too():
    pytest.importorskip("PIL")
    source = open_data(DataRecipe(image_size=16, channels=3), batch_size=16, seed=0)
    images, _ = next(source.train_batches(0))
    assert images.shape == (16, 3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 2])
    crops = open_data(DataRecipe(image_size=16, crop_scale=(0.3, 0.5)), batch_size=16, seed=0)
    assert next(crops.train_batches(0)).images.shape == (16, 1, 16, 16)
    assert torch.equal(next(crops.test_batches()).images, next(source.test_batches()).images[:, :1])


def test_descriptions_follow_the_recipe_but_not_where_and_how_it_is_read():
    def describe(**options):
        return open_data(DataRecipe(**options), batch_size=16, seed=0).describe()

    base = describe()
    assert base == describe(workers=1, test_batch_size=7, memory=0.5, root="elsewhere")
    assert describe(limit=100) != base
    assert describe(image_size=16) != base
    assert describe(mean=(0.1,), std=(1.0,)) != base
    assert describe(augment=({"name": "flip"},)) != base


def test_the_number_of_classes_is_checked():
    with pytest.raises(ValueError, match="digits has 10 classes, the recipe wants 100"):
        open_data(DataRecipe(classes=100), batch_size=16, seed=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "folder"}, "root must say where the images of folder are"),
        ({"mean": (0.5,)}, "mean and std must be given together"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "got 1 and 2 values"),
        ({"mean": (0.5,), "std": (0.0,)}, "std must be above 0"),
        ({"crop_scale": (0.1, 1.0)}, "crop_scale needs image_size"),
        ({"crop_scale": (0.9, 0.1), "image_size": 8}, "crop_scale"),
        ({"workers": -1}, "workers"),
        ({"name": "mnist"}, "name"),
        ({"wokers": 1}, "wokers"),
    ],
)
def test_bad_recipes_name_the_field(options, text):
    with pytest.raises(ValueError, match=text):
        DataRecipe(**options)


def test_normalization_that_does_not_fit_the_channels():
    with pytest.raises(ValueError, match="one value for each of 1 channels"):
        open_data(DataRecipe(mean=(0.5,) * 3, std=(0.5,) * 3), batch_size=16, seed=0)
