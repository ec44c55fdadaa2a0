"""Mixup and CutMix: weights from Beta, the partner, boxes, and labels that say what is in the image."""

import math

import numpy
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch.nn import functional

from repkern.data.augment import Mix
from repkern.data.augment._beta import symmetric_beta
from repkern.data.batch import Batch
from repkern.data.draws import Draws

UNIFORM = [2**-25, 1e-5, 0.01, 0.1, 0.3, 0.4999, 0.5, 0.5001, 0.6, 0.9, 0.99999, 1 - 2**-25]


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.5, 4.0, 32.0, 300.0])
def test_inverse_beta_is_scipys(alpha):
    got = [symmetric_beta(alpha, value) for value in UNIFORM]
    assert numpy.abs(got - stats.beta.ppf(UNIFORM, alpha, alpha)).max() < 1e-12
    # Near 0 the absolute error says nothing, so the way back as well. Near 1 a double cannot hold what is left.
    low = [(value, x) for value, x in zip(UNIFORM, got, strict=True) if value <= 0.5]
    back = stats.beta.cdf([x for _, x in low], alpha, alpha)
    numpy.testing.assert_allclose(back, [value for value, _ in low], rtol=1e-9)
    assert got == sorted(got)


@pytest.mark.parametrize(("alpha", "value"), [(0.0, 0.5), (-1.0, 0.5), (1.0, 0.0), (1.0, 1.0), (1.0, math.nan)])
def test_inverse_beta_refuses_what_has_none(alpha, value):
    with pytest.raises(ValueError, match="are needed, got"):
        symmetric_beta(alpha, value)


def batch_of(count, height=8, width=10, classes=5):
    generator = torch.Generator().manual_seed(count)
    images = torch.rand(count, 3, height, width, generator=generator)
    return Batch(images, torch.randint(classes, [count], generator=generator))


def draws_of(count, first=0):
    return Draws(7, 1, torch.arange(first, first + count))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_weights_are_beta_and_say_what_is_in_image_and_label(alpha):
    batch = batch_of(1000, 2, 2, classes=1000)._replace(labels=torch.arange(1000))
    mixed = Mix(mixup=alpha, each="sample")(batch, draws_of(1000), 1000)
    weights = mixed.labels.diagonal()
    assert stats.kstest(weights.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-4
    share = weights[:, None, None, None]
    torch.testing.assert_close(mixed.images, share * batch.images + (1 - share) * batch.images.flip(0))
    torch.testing.assert_close(mixed.labels.fliplr().diagonal(), 1 - weights)
    torch.testing.assert_close(mixed.labels.sum(1), torch.ones(1000))


def test_one_weight_serves_a_batch_and_is_that_of_its_first_sample():
    batch = batch_of(9)
    one = Mix(mixup=0.4)(batch, draws_of(9, 100), 5)
    each = Mix(mixup=0.4, each="sample")(batch, draws_of(9, 100), 5)
    hot = functional.one_hot(batch.labels, 5).float()
    weight = symmetric_beta(0.4, float(weight_draw(100)) + 2**-25)
    torch.testing.assert_close(one.labels, weight * hot + (1 - weight) * hot.flip(0))
    assert torch.equal(one.images[0], each.images[0])
    assert not torch.equal(one.images[1], each.images[1])
    torch.testing.assert_close(one.images[4], batch.images[4])  # its own partner


def weight_draw(sample):
    from repkern.data.augment._sampling import stream_number

    return Draws(7, 1, torch.tensor([sample])).uniform(stream_number("mix/parameters"), 5)[0, 2]


def test_weights_of_batches_are_beta():
    weights = []
    for first in range(500):
        batch = Batch(torch.rand(2, 1, 1, 1), torch.tensor([0, 1]))
        weights.append(float(Mix(mixup=0.8)(batch, draws_of(2, 2 * first), 2).labels[0, 0]))
    assert stats.kstest(weights, stats.beta(0.8, 0.8).cdf).pvalue > 1e-4


@pytest.mark.parametrize("each", ["batch", "sample"])
def test_cutmix_puts_a_box_of_the_other_image_in_and_labels_by_area(each):
    batch = batch_of(200, classes=200)._replace(labels=torch.arange(200))
    mixed = Mix(cutmix=1.0, each=each)(batch, draws_of(200), 200)
    places = set()
    for index, image in enumerate(mixed.images.numpy()):
        own, other = batch.images[index].numpy(), batch.images[199 - index].numpy()
        foreign = (image == other).all(axis=0)
        assert ((image == own).all(axis=0) | foreign).all()
        if foreign.any():
            rows, columns = numpy.flatnonzero(foreign.any(1)), numpy.flatnonzero(foreign.any(0))
            assert foreign[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            places.add((rows[0], rows[-1], columns[0], columns[-1]))
        assert mixed.labels[index, index].item() == pytest.approx(1 - foreign.mean(), abs=1e-6)
        assert mixed.labels[index, 199 - index].item() == pytest.approx(foreign.mean(), abs=1e-6)
    assert len(places) == 1 if each == "batch" else len(places) > 50


def test_cutmix_areas_are_those_of_the_weights_where_boxes_fit():
    # With one box a batch and 64 x 64 pixels, boxes cut at an edge are told by their place.
    areas = []
    for first in range(400):
        batch = Batch(torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 64, 64), torch.tensor([0, 1]))
        inside = Mix(cutmix=1.0)(batch, draws_of(2, 2 * first), 2).images[0, 0].numpy() == 1
        touches = inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any()
        weight = symmetric_beta(1.0, weight_of_first(2 * first))
        side = int(64 * math.sqrt(1 - weight))
        assert inside.sum() <= side**2
        if not touches:
            assert inside.sum() == side**2
            areas.append(side)
    assert len(areas) > 50


def weight_of_first(sample):
    return float(weight_draw(sample)) + 2**-25


def test_switch_and_probability_say_how_often():
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    step = Mix(mixup=1.0, cutmix=1.0, probability=0.8, switch=0.25, each="sample")
    images = torch.arange(1200.0)[:, None, None, None].expand(1200, 1, 16, 16) / 1200
    mixed = step(Batch(images, torch.arange(1200) % 2), draws_of(1200), 2)
    for before, after in zip(images, mixed.images, strict=True):
        same = after == before
        kinds["none" if same.all() else "mixup" if not same.any() else "cutmix"] += 1
    # A CutMix box of no pixel at all looks like "none", one of all pixels like mixup: 2 % of uniform weights at most.
    assert stats.binomtest(kinds["none"], 1200, 0.2 + 0.2 * 1 / 256).pvalue > 1e-4
    assert stats.binomtest(kinds["cutmix"], 1200, 0.2).pvalue > 1e-4


def test_unmixed_batches_have_soft_labels_too():
    batch = batch_of(6)
    same = Mix(mixup=0.2, probability=0.0)(batch, draws_of(6), 5)
    assert torch.equal(same.images, batch.images)
    assert torch.equal(same.labels, functional.one_hot(batch.labels, 5).float())


def test_soft_labels_are_mixed_again_and_smoothing_commutes():
    batch, step = batch_of(8), Mix(mixup=0.3)
    once = step(batch, draws_of(8), 5)
    hot = Batch(batch.images, functional.one_hot(batch.labels, 5).float())
    assert torch.equal(step(hot, draws_of(8), 5).labels, once.labels)
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    smoothed = Batch(batch.images, hot.labels * 0.9 + 0.1 / 5)
    inside = functional.cross_entropy(logits, step(smoothed, draws_of(8), 5).labels)
    torch.testing.assert_close(functional.cross_entropy(logits, once.labels, label_smoothing=0.1), inside)


@pytest.mark.parametrize(("dtype", "labels"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_labels_are_not_rounded_with_the_images(dtype, labels):
    batch = batch_of(6)
    mixed = Mix(mixup=1.0, each="sample")(batch._replace(images=batch.images.to(dtype)), draws_of(6), 5)
    assert mixed.images.dtype == dtype
    assert mixed.labels.dtype == labels
    torch.testing.assert_close(mixed.labels.sum(1), torch.ones(6, dtype=labels))


@pytest.mark.parametrize("count", [0, 1])
def test_batches_without_a_partner(count):
    batch = batch_of(count)
    mixed = Mix(mixup=1.0, cutmix=1.0)(batch, draws_of(count), 5)
    assert mixed.labels.shape == (count, 5)
    torch.testing.assert_close(mixed.images, batch.images)


def test_wrong_labels_and_draws_are_errors():
    step, images = Mix(mixup=0.2), torch.rand(2, 1, 4, 4)
    cases = (
        (torch.tensor([0, 5]), r"labels must be 0 to 4, got 0 to 5"),
        (torch.tensor([0]), r"labels must be \[2\], got \[1\]"),
        (torch.rand(2, 4), r"soft labels must be \[2, 5\], got \[2, 4\]"),
    )
    for labels, message in cases:
        with pytest.raises(ValueError, match=message):
            step(Batch(images, labels), draws_of(2), 5)
    with pytest.raises(ValueError, match="draws of 3 samples do not fit 2 images"):
        step(Batch(images, torch.tensor([0, 1])), draws_of(3), 5)


@pytest.mark.parametrize("options", [{}, {"mixup": -1.0}, {"mixup": 1.0, "each": "pair"}, {"mixup": 1.0, "switch": 2}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValidationError):
        Mix(**options)
