"""Crops: the middle of an image for tests, a drawn part for training."""

import io

import numpy
import pytest
import torch

from repkern.data.draws import Draws
from repkern.data.framing import Framing

Image = pytest.importorskip("PIL.Image")


def coordinates(width, height):
    """An image that tells where its pixels were: red is x, green y."""
    x, y = numpy.meshgrid(numpy.arange(width), numpy.arange(height))
    return Image.fromarray(numpy.stack([x, y, numpy.zeros_like(x)], 2).astype(numpy.uint8))


def test_the_middle_of_an_image():
    image = coordinates(100, 60)
    pixels = Framing(60).read(image)
    assert pixels.shape == (3, 60, 60)
    assert pixels[0, 0].tolist() == list(range(20, 80))
    assert pixels[1, :, 0].tolist() == list(range(60))
    pixels = Framing(30, test_crop=0.5).read(image)
    assert pixels[0, 0].tolist() == list(range(35, 65))
    assert pixels[1, :, 0].tolist() == list(range(15, 45))


def test_resizing_is_antialiased():
    stripes = numpy.tile(numpy.array([0, 255], dtype=numpy.uint8), (64, 32))
    pixels = Framing(8, channels=1).read(Image.fromarray(stripes))
    assert pixels.shape == (1, 8, 8)
    assert (pixels.float() - 127.5).abs().max() < 20


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_enlarging(interpolation):
    pixels = Framing(40, interpolation=interpolation).read(coordinates(20, 20)).float()
    wanted = (torch.arange(40) + 0.5) / 2 - 0.5
    assert (pixels[0, 20] - wanted)[4:-4].abs().max() <= 0.51


def crops(count, **options):
    """Left, top, width and height of drawn crops of a 200 x 120 image, read off their pixels."""
    framing = Framing(32, crop_scale=(0.2, 0.9), **options)
    image = coordinates(200, 120)
    found = []
    for row in framing.numbers(Draws(0, 0, torch.arange(count))):
        x, y, _ = framing.read(image, row).double()
        across, down = (x[:, -1] - x[:, 0]).mean() * 32 / 31, (y[-1] - y[0]).mean() * 32 / 31
        found.append((float(x[:, 0].mean() - across / 64), float(y[0].mean() - down / 64), float(across), float(down)))
    return torch.tensor(found)


def test_random_crops_have_the_areas_and_shapes_that_were_asked_for():
    left, top, width, height = crops(300).T
    area, ratio = width * height / (200 * 120), width / height
    assert area.min() > 0.19
    assert area.max() < 0.82  # 4:3 of the whole height; larger ones do not fit
    assert area.max() - area.min() > 0.5
    assert ratio.min() > 0.72
    assert ratio.max() < 1.37
    assert ratio.max() - ratio.min() > 0.5
    assert left.min() > -2
    assert (left + width).max() < 202
    assert (top + height).max() < 122
    assert left.std() > 10
    assert top.std() > 5


def test_a_crop_belongs_to_its_sample():
    assert torch.equal(crops(5)[:3], crops(3))
    framing = Framing(32, crop_scale=(0.2, 0.9))
    whole = framing.numbers(Draws(1, 2, torch.arange(10)))
    assert torch.equal(framing.numbers(Draws(1, 2, torch.tensor([7, 3]))), whole[[7, 3]])


def test_no_crop_that_fits_gives_the_largest_in_the_middle():
    framing = Framing(10, crop_scale=(0.99, 1.0), crop_ratio=(1.0, 1.0))
    numbers = framing.numbers(Draws(0, 0, torch.arange(1)))[0]
    pixels = framing.read(coordinates(200, 40), numbers)
    assert 80 <= int(pixels[0].min()) <= 84
    assert 115 <= int(pixels[0].max()) <= 119


@pytest.mark.parametrize("turn", [1, 6])
def test_crops_of_large_jpegs_show_the_same_part(turn):
    """Decoding at a part of the size must not move the crop, upright or turned."""
    gradient = Image.fromarray(numpy.asarray(coordinates(250, 200).resize((1000, 800), Image.Resampling.BICUBIC)))
    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    kept = gradient if turn == 1 else gradient.transpose(Image.Transpose.ROTATE_90)
    kept.save(buffer, "JPEG", quality=98, subsampling=0, exif=exif)
    framing = Framing(48, crop_scale=(0.3, 0.6))
    for row in framing.numbers(Draws(0, 0, torch.arange(5))):
        with Image.open(io.BytesIO(buffer.getvalue())) as image:
            found = framing.read(image, row)[:2].float()
        assert (found - framing.read(gradient, row)[:2].float()).abs().mean() < 1.5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"test_crop": 0.0}, "test_crop must be above 0 and at most 1, got 0.0"),
        ({"crop_scale": (0.5, 0.2)}, r"crop_scale must be two parts .* got \(0.5, 0.2\)"),
        ({"crop_scale": (0.5, 1.2)}, "crop_scale must be two parts"),
        ({"crop_scale": (0.5, 1.0), "size": 0}, "random crops need image_size"),
        ({"crop_scale": (0.5, 1.0), "crop_ratio": (2.0, 1.0)}, "crop_ratio must be two ratios"),
    ],
)
def test_senseless_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        Framing(**({"size": 8} | options))
