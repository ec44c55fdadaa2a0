"""Image files of every kind become the 8-bit pixels that one sees."""

import io

import numpy
import pytest
import torch

from repkern.data.errors import MissingExtraError
from repkern.data.images import decode, open_image, pixels_of, size_of

Image = pytest.importorskip("PIL.Image")


def stored(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def read(data, channels=3):
    with open_image(data) as image:
        return pixels_of(decode(image, channels))


def ramp(size=16):
    """[size, size, 3] uint8: red to the right, green downwards, blue constant."""
    y, x = numpy.mgrid[:size, :size] * 10
    return numpy.stack([x, y, numpy.full_like(x, 77)], 2).astype(numpy.uint8)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_lossless_colour_is_not_touched(form):
    pixels = ramp()
    data = stored(Image.fromarray(pixels), form, **({"lossless": True} if form == "WEBP" else {}))
    assert torch.equal(read(data), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_becomes_colour_and_colour_grey(mode):
    grey = numpy.where(ramp()[:, :, 0] > 70, 255, 0).astype(numpy.uint8)
    data = stored(Image.fromarray(grey).convert(mode), "PNG")
    assert torch.equal(read(data), torch.from_numpy(grey).expand(3, -1, -1))
    assert torch.equal(read(data, 1), torch.from_numpy(grey)[None])
    wanted = (ramp() @ numpy.array([0.299, 0.587, 0.114]))[None]
    assert (read(stored(Image.fromarray(ramp()), "PNG"), 1).double() - torch.from_numpy(wanted)).abs().max() <= 1


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bits_keep_their_brightness(form):
    wide = numpy.linspace(0, 65535, 256).round().astype(numpy.uint16).reshape(16, 16)
    wanted = torch.from_numpy((wide / 257 + 0.5).astype(numpy.uint8))
    assert wanted.max() == 255
    found = read(stored(Image.fromarray(wide), form))
    assert torch.equal(found, wanted.expand(3, -1, -1))


def test_16_bit_colour_keeps_its_brightness():
    """Written by hand, since Pillow writes none: the high bytes are the 8-bit values."""
    import struct
    import zlib

    pixels = ramp()
    rows = b"".join(b"\0" + numpy.repeat(row.reshape(-1), 2).tobytes() for row in pixels)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert torch.equal(read(data), torch.from_numpy(pixels).permute(2, 0, 1))


def test_floating_values_from_0_to_1():
    values = numpy.linspace(0, 1, 256, dtype=numpy.float32).reshape(16, 16)
    assert torch.equal(read(stored(Image.fromarray(values), "TIFF"))[0].flatten(), torch.arange(256).to(torch.uint8))
    with pytest.raises(ValueError, match="values go from 0 to 300, those of mode F are read as 0 to 1"):
        read(stored(Image.fromarray(values * 300), "TIFF"))


def test_cmyk_jpeg_is_seen_as_its_colours():
    image = Image.fromarray(numpy.full((16, 16, 3), (200, 40, 90), dtype=numpy.uint8))
    found = read(stored(image.convert("CMYK"), "JPEG", quality=95)).float().mean((1, 2))
    assert (found - torch.tensor([200.0, 40, 90])).abs().max() < 6


def test_palettes_are_looked_up():
    image = Image.fromarray(ramp()).quantize(256)
    wanted = numpy.array(image.convert("RGB"))
    for form in ("PNG", "GIF"):
        assert torch.equal(read(stored(image, form)), torch.from_numpy(wanted).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_stand_on_white(mode):
    layer = numpy.zeros((4, 4, 4), dtype=numpy.uint8)
    layer[:, 2:, 3] = 255  # the right half is black, the left one nothing
    layer[0, 0] = (0, 0, 0, 102)  # 40 % of black
    if mode == "P":
        layer[0, 0] = 0
        image = Image.fromarray(layer).convert("RGBA").quantize(4, method=Image.Quantize.FASTOCTREE)
    else:
        image = Image.fromarray(layer).convert(mode)
    found = read(stored(image, "PNG"))
    assert (found[:, :, 2:] == 0).all()
    assert (found[:, 1:, :2] == 255).all()
    assert found[0, 0, 0] == (255 if mode == "P" else 153)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_followed(turn):
    upright = Image.fromarray(ramp()[:, :10])
    undo = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270")
    kept = upright if turn == 1 else upright.transpose(Image.Transpose[undo[turn - 2]])
    exif = Image.Exif()
    exif[0x0112] = turn
    data = stored(kept, "PNG", exif=exif)
    with open_image(data) as image:
        assert size_of(image) == (10, 16)
    assert torch.equal(read(data), torch.from_numpy(numpy.asarray(upright).copy()).permute(2, 0, 1))


def test_the_first_frame_of_several():
    frames = [Image.fromarray(numpy.full((4, 4), value, dtype=numpy.uint8)) for value in (10, 200)]
    assert (read(stored(frames[0], "GIF", save_all=True, append_images=frames[1:])) == 10).all()


def test_large_jpegs_are_decoded_at_a_part_of_their_size():
    data = stored(Image.fromarray(numpy.kron(ramp(), numpy.ones((16, 16, 1), numpy.uint8))), "JPEG", quality=95)
    for wanted, expected in ((60, 64), (64, 64), (65, 128), (200, 256)):
        with open_image(data) as image:
            small = decode(image, 3, (wanted, wanted))
        assert small.size == (expected, expected)
        exact = Image.fromarray(ramp()).resize((expected, expected), Image.Resampling.NEAREST)
        difference = numpy.abs(numpy.asarray(small).astype(int) - numpy.asarray(exact).astype(int))
        assert difference.mean() < 8  # blocks have soft edges


def test_without_pillow_the_text_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'repkern\[train\]'"):
        open_image(b"")
