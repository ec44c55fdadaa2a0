"""Operations of RandAugment and its kind against Pillow on the same 8-bit images."""

import colorsys
import math
from collections import Counter

import numpy
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats

from repkern.data.augment import Grayscale, Jitter, Lighting
from repkern.data.augment._colors import grey
from repkern.data.augment._operations import Operation, apply_operations
from repkern.data.draws import Draws

pytest.importorskip("kornia")

LEVEL = 1 / 255


def pictures(channels=3, size=(23, 34)):
    """8-bit images [5, H, W, C]: dark noise, a ramp, few levels, one level, and all levels."""
    generator = numpy.random.default_rng(0)
    shape = (*size, channels)
    ramp = numpy.broadcast_to(numpy.linspace(20, 200, size[1])[:, None], shape) + generator.integers(0, 30, shape)
    images = [
        generator.integers(0, 90, shape),
        ramp,
        generator.choice([3, 90, 128, 250], shape),
        numpy.full(shape, 77),
        generator.integers(0, 256, shape),
    ]
    return numpy.stack(images).astype(numpy.uint8)


def to_tensor(levels):
    return torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255


def to_pillow(levels):
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)


def from_pillow(image):
    levels = numpy.asarray(image)
    return levels[..., None] if levels.ndim == 2 else levels


def applied(name, argument, levels, **options):
    images = to_tensor(levels)
    got = apply_operations(images, [Operation(name, argument)] * len(images), fill=128 / 255, nearest=False, **options)
    assert got.shape == images.shape
    assert 0 <= float(got.min()) <= float(got.max()) <= 1
    return got.permute(0, 2, 3, 1).double().numpy()


def largest_error(name, argument, reference, channels=3):
    levels = pictures(channels)
    expected = numpy.stack([from_pillow(reference(to_pillow(image))) for image in levels]) / 255
    return numpy.abs(applied(name, argument, levels) - expected).max()


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_on_levels_are_pillows(channels):
    exact = 1e-6
    for bits in range(1, 9):
        assert largest_error("posterize", bits, lambda i, bits=bits: ImageOps.posterize(i, bits), channels) < exact, (
            bits
        )
    assert largest_error("posterize", 0, lambda i: i.point([0] * 256 * channels), channels) == 0
    for threshold in (0, 1, 64, 128, 255, 256):
        reference = lambda i, threshold=threshold: ImageOps.solarize(i, threshold)  # noqa: E731
        assert largest_error("solarize", threshold, reference, channels) < exact, threshold
    assert largest_error("invert", 0, ImageOps.invert, channels) < exact
    assert largest_error("equalize", 0, ImageOps.equalize, channels) < exact
    for add in (0, 11, 110, 154):
        table = [min(255, level + add) if level < 128 else level for level in range(256)] * channels
        assert largest_error("solarize_add", add, lambda i, table=table: i.point(table), channels) < exact, add
    # Pillow rounds down to a level.
    assert largest_error("autocontrast", 0, ImageOps.autocontrast, channels) < LEVEL


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.3, 1.9, 2.6])
@pytest.mark.parametrize("channels", [1, 3])
def test_enhancements_are_pillows(channels, factor):
    # Pillow rounds its grey or smoothed image to a level (half a one off) and the result down to one.
    bound = (1 + 0.5 * abs(1 - factor)) * LEVEL + 1e-6
    for name in ("Brightness", "Contrast", "Color", "Sharpness"):
        reference = lambda i, name=name: getattr(ImageEnhance, name)(i).enhance(factor)  # noqa: E731
        error = largest_error(name.lower(), factor, reference, channels)
        assert error < (1e-6 if factor == 1 else bound), name


def test_smoothing_is_that_of_pillow_and_tiny_images_stay():
    error = largest_error("sharpness", 0.0, lambda i: i.filter(ImageFilter.SMOOTH))
    assert error < 0.5 * LEVEL + 1e-6
    narrow = pictures(3, (2, 9))
    numpy.testing.assert_array_equal(applied("sharpness", 1.9, narrow), narrow.astype(numpy.float32) / 255)


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.1, 0.37])
def test_hue_is_that_of_colorsys(turn):
    levels = pictures(3, (5, 6))
    got = applied("hue", turn, levels)
    for image, result in zip(levels.reshape(-1, 3) / 255, got.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*image)
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert numpy.abs(result - expected).max() < 1e-5


def test_grey_images_have_no_color_to_change():
    images = to_tensor(pictures(1))
    for name in ("color", "hue"):
        assert torch.equal(apply_operations(images, [Operation(name, 0.3)] * 5, fill=0.5, nearest=False), images)
    draws = Draws(0, 0, torch.arange(5))
    assert torch.equal(Jitter(brightness=0, contrast=0, saturation=0.9, hue=0.5)(images, draws), images)
    assert Lighting()(images, draws) is images
    assert Grayscale(probability=1)(images, draws) is images


def test_luma_is_pillows():
    levels = pictures()
    expected = numpy.stack([numpy.asarray(to_pillow(image).convert("L")) for image in levels]) / 255
    assert numpy.abs(grey(to_tensor(levels))[:, 0].numpy() - expected).max() <= 0.5 * LEVEL + 1e-6


# What Pillow's affine transform takes: the same rows, from the upper left corner.
MOVES = {
    "rotate": (-27.0, None),
    "shear_x": (0.3, (1, 0.3, 0, 0, 1, 0)),
    "shear_y": (-0.25, (1, 0, 0, -0.25, 1, 0)),
    "translate_x": (0.2, (1, 0, 0.2 * 34, 0, 1, 0)),
    "translate_y": (-0.3, (1, 0, 0, 0, 1, -0.3 * 23)),
    "shift_x": (3.0, (1, 0, 3, 0, 1, 0)),
    "shift_y": (-7.0, (1, 0, 0, 0, 1, -7)),
}


def moved_by_pillow(name, image, fill):
    argument, row = MOVES[name]
    if row is None:
        return image.rotate(argument, Image.Resampling.BILINEAR, fillcolor=fill)
    return image.transform(image.size, Image.Transform.AFFINE, row, Image.Resampling.BILINEAR, fillcolor=fill)


@pytest.mark.parametrize("name", MOVES)
def test_moves_are_pillows_inside_and_the_fill_outside(name):
    levels = pictures()
    got = applied(name, MOVES[name][0], levels)
    # Pillow has a hard edge, grid sampling a soft one: pixels that see the outermost row are left out.
    inner = numpy.zeros((23, 34), numpy.uint8)
    inner[1:-1, 1:-1] = 255
    inside = numpy.asarray(moved_by_pillow(name, Image.fromarray(inner), 0)) == 255
    covered = moved_by_pillow(name, Image.fromarray(numpy.full((23, 34), 255, numpy.uint8)), 0)
    outside = numpy.asarray(covered.filter(ImageFilter.MaxFilter(5))) == 0
    assert inside.sum() > 200
    assert outside.any() or name in ("shear_x", "shear_y", "shift_x")
    for image, result in zip(levels, got, strict=True):
        expected = numpy.asarray(moved_by_pillow(name, Image.fromarray(image), (128, 128, 128))) / 255
        # Pillow rounds down to a level; positions in float32 are off by 1e-6 of the side, times steps of up to 1.
        assert numpy.abs(result - expected)[inside].max() < LEVEL + 1e-4
        assert numpy.abs(result[outside] - 128 / 255).max(initial=0) < 1e-6


def test_every_image_has_its_own_operation():
    images = to_tensor(pictures())
    chosen = [
        Operation("invert"), Operation("identity"), Operation("shift_x", 3.0), Operation("posterize", 2.0),
        Operation("shift_y", -1.0),
    ]  # fmt: skip
    got = apply_operations(images, chosen, fill=0.25, nearest=True)
    for index, operation in enumerate(chosen):
        alone = apply_operations(images[index : index + 1], [operation], fill=0.25, nearest=True)
        assert torch.equal(got[index : index + 1], alone)
    assert torch.equal(got[1], images[1])
    torch.testing.assert_close(got[2, :, :, :-3], images[2, :, :, 3:])
    torch.testing.assert_close(got[2, :, :, -3:], torch.full((3, 23, 3), 0.25))
    torch.testing.assert_close(got[4, :, 1:], images[4, :, :-1])


def test_cutouts_are_squares_of_a_part_of_the_shorter_side():
    images = torch.zeros(3, 3, 20, 40)
    chosen = [Operation("cutout", 0.5, (0.5, 0.5)), Operation("cutout", 0.0, (0.5, 0.5)), Operation("cutout", 0.5)]
    got = apply_operations(images, chosen, fill=1.0, nearest=False)
    assert got.sum((1, 2, 3)).tolist() == [3 * 100, 3 * 4, 3 * 25]
    assert (got[0, :, 5:15, 15:25] == 1).all()


def test_jitter_is_its_operations_in_an_order_of_each_image():
    levels = numpy.repeat(pictures(size=(5, 6))[4:], 60, axis=0)
    images, draws = to_tensor(levels), Draws(0, 0, torch.arange(60))
    step = Jitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.3)
    got = step(images, draws)
    factors, order = factors_of(draws), order_of(draws)
    for index in range(60):
        image = images[index : index + 1]
        for kind in order[index]:
            name = ("brightness", "contrast", "color", "hue")[kind]
            argument = 0.6 * factors[index][kind] - 0.3 if name == "hue" else 0.5 + factors[index][kind]
            image = apply_operations(image, [Operation(name, argument)], fill=0.0, nearest=False)
        torch.testing.assert_close(got[index : index + 1], image, rtol=0, atol=2e-6)
    # All 24 orders, evenly.
    many = order_of(Draws(0, 0, torch.arange(2400)))
    kinds = Counter(tuple(row) for row in many)
    assert len(kinds) == 24
    assert stats.chisquare(list(kinds.values())).pvalue > 1e-4


def factors_of(draws):
    from repkern.data.augment._sampling import stream_number

    return draws.uniform(stream_number("jitter/factors"), 4).tolist()


def order_of(draws):
    from repkern.data.augment._sampling import stream_number

    values = draws.uniform(stream_number("jitter/order"), 4).tolist()
    return [sorted(range(4), key=row.__getitem__) for row in values]


def test_brightness_factors_are_even_and_as_often_as_said():
    images = torch.full((2000, 1, 1, 1), 0.5)
    step = Jitter(brightness=0.8, contrast=0, saturation=0, probability=0.6)
    factors = step(images, Draws(0, 0, torch.arange(2000)))[:, 0, 0, 0].double().numpy() / 0.5
    changed = factors[factors != 1]
    assert stats.binomtest(len(changed), 2000, 0.6).pvalue > 1e-4
    assert stats.kstest(changed, stats.uniform(0.2, 1.6).cdf).pvalue > 1e-4


def test_lighting_is_noise_along_the_axes():
    images = torch.full((4000, 3, 1, 1), 0.5)
    shifts = (Lighting(deviation=0.2)(images, Draws(0, 0, torch.arange(4000)))[:, :, 0, 0] - 0.5).double().numpy()
    axes = numpy.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    along = shifts @ axes
    for values, deviation in zip(along.T, (0.2175, 0.0188, 0.0045), strict=True):
        assert stats.kstest(values / (0.2 * deviation), stats.norm.cdf).pvalue > 1e-4
    assert numpy.abs(numpy.corrcoef(along.T) - numpy.eye(3)).max() < 5 / math.sqrt(4000)
    bright = Lighting(deviation=5.0)(torch.rand(50, 3, 4, 4), Draws(0, 0, torch.arange(50)))
    assert 0 <= float(bright.min()) <= float(bright.max()) <= 1


def test_grayscale_makes_some_images_grey():
    images = torch.rand(1000, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    got = Grayscale(probability=0.3)(images, Draws(0, 0, torch.arange(1000)))
    changed = [not torch.equal(a, b) for a, b in zip(got, images, strict=True)]
    assert stats.binomtest(sum(changed), 1000, 0.3).pvalue > 1e-4
    assert torch.equal(got[changed], grey(images).expand(-1, 3, -1, -1)[changed])
