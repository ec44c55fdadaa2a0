import pytest

from repkern.viz import plot_curves

pytest.importorskip("matplotlib")


def history(epochs, accuracy):
    keys = ("train_loss", "test_loss", "train_accuracy")
    return [{"epoch": e, **dict.fromkeys(keys, 1 / e), "test_accuracy": accuracy} for e in range(1, epochs + 1)]


@pytest.mark.parametrize("epochs", [1, 2, 30])
@pytest.mark.parametrize("accuracy", [0.0, 0.5, 1.0])
def test_any_history_can_be_drawn(tmp_path, epochs, accuracy):
    path = tmp_path / "curves.png"
    plot_curves({"plain": history(epochs, accuracy), "OREPA": history(epochs, 0.99)}, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 1650
    assert int.from_bytes(data[20:24], "big") == 660


def test_equal_histories_give_equal_files(tmp_path):
    for name in ("a.png", "b.png"):
        plot_curves({"plain": history(3, 0.9)}, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("histories", [{}, {"plain": []}, {str(n): history(1, 0.5) for n in range(5)}])
def test_what_cannot_be_drawn_is_an_error(tmp_path, histories):
    with pytest.raises(ValueError, match=r"got|fit into"):
        plot_curves(histories, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
