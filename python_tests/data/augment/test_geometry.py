"""Flip, crop, affine, erasing and cutout against what NumPy says of the same draws."""

import math

import numpy
import pytest
import torch
from scipy import stats
from torch.nn import functional

from repkern.data.augment import Affine, Crop, Cutout, Erasing, Flip
from repkern.data.augment._sampling import integers, normals, signs, stream_number
from repkern.data.augment._warp import warp
from repkern.data.draws import Draws


def indexed(count, channels, height, width):
    """Images whose every pixel is different."""
    size = count * channels * height * width
    return (torch.arange(size) / size).reshape(count, channels, height, width)


def test_flips_are_numpy_flips_as_often_as_said():
    images, draws = indexed(1000, 2, 3, 4), Draws(0, 0, torch.arange(1000))
    flipped = Flip(horizontal=0.3, vertical=0.6)(images, draws).numpy()
    counts = {}
    for before, after in zip(images.numpy(), flipped, strict=True):
        ways = [way for way in ((), (2,), (1,), (1, 2)) if numpy.array_equal(numpy.flip(before, way), after)]
        assert len(ways) == 1
        counts[ways[0]] = counts.get(ways[0], 0) + 1
    observed = [counts[way] for way in ((), (2,), (1,), (1, 2))]
    expected = [700 * 0.4, 300 * 0.4, 700 * 0.6, 300 * 0.6]
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize(("mode", "numpy_mode"), [("zeros", "constant"), ("reflect", "reflect"), ("border", "edge")])
def test_crops_are_windows_of_padded_images_evenly_drawn(mode, numpy_mode):
    padding, images = 2, indexed(600, 1, 4, 5)
    cropped = Crop(padding=padding, mode=mode)(images, Draws(0, 0, torch.arange(600))).numpy()
    counts = numpy.zeros((5, 5))
    for before, after in zip(images.numpy(), cropped, strict=True):
        padded = numpy.pad(before, [(0, 0), (padding,) * 2, (padding,) * 2], mode=numpy_mode)
        found = [
            (y, x) for y in range(5) for x in range(5) if numpy.array_equal(padded[:, y : y + 4, x : x + 5], after)
        ]
        assert len(found) == 1
        counts[found[0]] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_reflection_of_more_than_the_image_is_an_error():
    with pytest.raises(ValueError, match=r"less than the side of images, 4x9, got 4"):
        Crop(padding=4, mode="reflect")(torch.zeros(1, 1, 4, 9), Draws(0, 0, torch.arange(1)))
    Crop(padding=4)(torch.zeros(1, 1, 2, 2), Draws(0, 0, torch.arange(1)))


def test_affine_is_torchs_affine_grid_of_the_same_draws():
    images, draws = torch.rand(32, 2, 11, 11), Draws(0, 0, torch.arange(32))
    got = Affine(strength=1.5)(images, draws)
    angle, scale, right, down = 1.5 * (2 * draws.uniform(stream_number("affine/parameters"), 4).T - 1)
    angle, scale = math.radians(10) * angle, 1 + 0.1 * scale
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), right / 4], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), down / 4], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), [32, 2, 11, 11], align_corners=False)
    expected = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_affine_of_nothing_is_the_identity():
    images = torch.rand(3, 1, 5, 6)
    for step in (Affine(strength=0), Affine(degrees=0, scale=0, translate=0)):
        assert step(images, Draws(0, 0, torch.arange(3))) is images


@pytest.mark.parametrize("size", [(8, 8), (9, 14)])
def test_warps_are_bilinear_sampling_about_the_centre(size):
    height, width = size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 2, height, width, generator=generator, dtype=torch.float64)
    matrices = torch.tensor([1.0, 0, 0, 0, 1, 0]).repeat(5, 1) + 0.4 * torch.rand(5, 6, generator=generator)
    got = warp(images, matrices.double(), fill=0.5).numpy()
    for image, row, result in zip(images.numpy(), matrices.double().numpy(), got, strict=True):
        padded = numpy.pad(image, [(0, 0), (1, 1), (1, 1)], constant_values=0.5)
        for y in range(height):
            for x in range(width):
                across, down = x - (width - 1) / 2, y - (height - 1) / 2
                left = row[:3] @ [across, down, 1] + (width - 1) / 2 + 1
                top = row[3:] @ [across, down, 1] + (height - 1) / 2 + 1
                expected = bilinear(padded, top, left)
                assert numpy.abs(result[:, y, x] - expected).max() < 1e-12


def bilinear(padded, top, left):
    """One pixel between four, where the outermost row of `padded` goes on for ever."""
    total = 0
    for y in (math.floor(top), math.floor(top) + 1):
        for x in (math.floor(left), math.floor(left) + 1):
            inside = numpy.clip([y, x], 0, [padded.shape[1] - 1, padded.shape[2] - 1])
            total += (1 - abs(top - y)) * (1 - abs(left - x)) * padded[:, inside[0], inside[1]]
    return total


def painted(before, after):
    """The bounding box of what differs (top, bottom, left, right), and the box's pixels."""
    differs = (before != after).any(axis=0)
    rows, columns = numpy.flatnonzero(differs.any(1)), numpy.flatnonzero(differs.any(0))
    box = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return box, after[:, box[0] : box[1], box[2] : box[3]], differs


def test_erasing_paints_whole_boxes_of_the_areas_and_ratios_asked_for():
    images = indexed(400, 2, 40, 60) / 2 + 0.25
    step = Erasing(probability=0.7, area=(0.1, 0.3), ratio=(0.5, 2.0), fill="value", value=1.0)
    erased = step(images, Draws(0, 0, torch.arange(400))).numpy()
    areas, ratios, untouched = [], [], 0
    for before, after in zip(images.numpy(), erased, strict=True):
        if numpy.array_equal(before, after):
            untouched += 1
            continue
        (top, bottom, left, right), pixels, differs = painted(before, after)
        assert (pixels == 1).all()
        assert differs.sum() == (bottom - top) * (right - left)
        areas.append(differs.sum() / (40 * 60))
        ratios.append((bottom - top) / (right - left))
    assert stats.binomtest(untouched, 400, 0.3).pvalue > 1e-4
    # One rounded side of 11 pixels or more.
    assert 0.1 / 1.1 <= min(areas) <= max(areas) <= 0.3 * 1.1
    assert 0.5 / 1.1 <= min(ratios) <= max(ratios) <= 2 * 1.1
    assert stats.kstest(areas, stats.uniform(0.1, 0.2).cdf).pvalue > 1e-4
    assert stats.kstest(numpy.log(ratios), stats.uniform(-math.log(2), 2 * math.log(2)).cdf).pvalue > 1e-4


def test_erasing_with_noise_and_with_one_color():
    images, draws = torch.full((60, 3, 24, 24), 0.5), Draws(0, 0, torch.arange(60))
    noise = Erasing(probability=1.0, area=(0.2, 0.4), fill="noise")(images, draws).numpy()
    values = noise[noise != 0.5]
    assert stats.kstest(values, stats.uniform.cdf).pvalue > 1e-4
    colors = []
    for before, after in zip(
        images.numpy(), Erasing(probability=1.0, fill="color")(images, draws).numpy(), strict=True
    ):
        _, pixels, _ = painted(before, after)
        assert (pixels == pixels[:, :1, :1]).all()
        colors.append(pixels[:, 0, 0])
    assert len({tuple(color) for color in colors}) == 60
    assert stats.kstest(numpy.ravel(colors), stats.uniform.cdf).pvalue > 1e-4


def test_erasing_where_nothing_fits_leaves_the_image():
    images = torch.rand(20, 1, 1, 40)
    assert torch.equal(Erasing(probability=1.0)(images, Draws(0, 0, torch.arange(20))), images)


def test_cutout_is_a_square_about_any_pixel():
    images = indexed(500, 1, 10, 12) / 4
    cut = Cutout(size=4, value=1.0)(images, Draws(0, 0, torch.arange(500))).numpy()
    centres = numpy.zeros((10, 12))
    for before, after in zip(images.numpy(), cut, strict=True):
        matches = []
        for y in range(10):
            for x in range(12):
                expected = before.copy()
                expected[:, max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = 1
                matches += [(y, x)] * numpy.array_equal(expected, after)
        assert len(matches) == 1
        centres[matches[0]] += 1
    assert stats.chisquare(centres.sum(0)).pvalue > 1e-4
    assert stats.chisquare(centres.sum(1)).pvalue > 1e-4


def test_draws_become_integers_signs_and_normal_numbers():
    uniform = Draws(0, 0, torch.arange(5000)).uniform(1, 1)[:, 0]
    chosen = integers(uniform, 7)
    assert stats.chisquare(numpy.bincount(chosen, minlength=7)).pvalue > 1e-4
    assert stats.binomtest(int((signs(uniform) == 1).sum()), 5000).pvalue > 1e-4
    assert set(signs(uniform).tolist()) == {-1.0, 1.0}
    assert stats.kstest(normals(uniform).numpy(), stats.norm.cdf).pvalue > 1e-4
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert integers(edges, 2**20 + 1).tolist() == [0, 2**20]
    assert torch.isfinite(normals(edges)).all()
    numpy.testing.assert_allclose(normals(edges).numpy(), stats.norm.ppf([2**-25, 1 - 2**-25]), rtol=1e-6)


def test_streams_of_purposes_stay_what_they_are():
    # Other numbers would give a resumed run other augmentations than it began with.
    assert stream_number("flip/horizontal") == 0x19FECA99
    assert stream_number("mix/parameters") == 0xB1C1FA90
