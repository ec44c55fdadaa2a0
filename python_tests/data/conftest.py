import numpy
import pytest
import torch

from repkern.data import MemoryData


@pytest.fixture
def make_set():
    """Images whose pixels are their number: [N, 1, 4, 4] uint8, in ten classes."""

    def make(count=50, channels=1):
        images = torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1).expand(count, channels, 4, 4)
        return MemoryData(images, torch.arange(count) % 10, [f"class {number}" for number in range(10)])

    return make


@pytest.fixture
def make_folder(tmp_path):
    """An image folder of two classes: train/cat/0.png and so on, each image of one colour of its own."""

    def make(count=8, tests=3, size=(12, 10), suffix=".png"):
        images = pytest.importorskip("PIL.Image")
        for part, many in (("train", count), ("test", tests)):
            for at, name in enumerate(("cat", "dog")):
                folder = tmp_path / "photos" / part / name
                folder.mkdir(parents=True)
                for number in range(many):
                    pixels = numpy.full((*size, 3), 100 * at + 5 * number, dtype=numpy.uint8)
                    images.fromarray(pixels).save(folder / f"{number}{suffix}")
        return tmp_path / "photos"

    return make
