import pytest
import torch

from repkern.data import augment
from repkern.data.draws import Draws
from repkern.viz import plot_augmentations

pytest.importorskip("matplotlib")


def rows_of(channels):
    images, draws = (
        torch.rand(3, channels, 12, 10, generator=torch.Generator().manual_seed(0)),
        Draws(0, 0, torch.arange(3)),
    )
    return {"original": images, "affine": augment.Affine()(images, draws), "erasing": augment.Erasing()(images, draws)}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_is_a_picture_of_its_size_and_repeats(tmp_path, channels):
    for name in ("a.png", "b.png"):
        plot_augmentations(rows_of(channels), tmp_path / name)
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 675
    assert int.from_bytes(data[20:24], "big") == 495
    assert data == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "rows",
    [
        {},
        {"a": torch.zeros(0, 3, 4, 4)},
        {"a": torch.zeros(2, 2, 4, 4)},
        {"a": torch.zeros(3, 4, 4)},
        {"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(1, 3, 4, 4)},
        {"a": torch.zeros(17, 3, 4, 4)},
    ],
)
def test_what_cannot_be_drawn_is_an_error(tmp_path, rows):
    with pytest.raises(ValueError, match="got"):
        plot_augmentations(rows, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
