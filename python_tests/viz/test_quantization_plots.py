import pytest
import torch

from repkern.deploy.quantize_report import KernelSpread, LayerSensitivity, SensitivityReport
from repkern.deploy.quantize_torchao import Scheme
from repkern.viz import plot_kernels, plot_sensitivity

pytest.importorskip("matplotlib")


def report(layers):
    spread = KernelSpread(0.1, 0.2, 0.05, 1.0, 2.0)
    of = [LayerSensitivity(f"layer{at}", (8, 8, 3, 3), 40.0 - at, 60.0, 38.0 - at, spread) for at in range(layers)]
    return SensitivityReport(tuple(of), 30.0, Scheme())


def width_of(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20], "big")


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_kernels_of_any_size_can_be_drawn(tmp_path, count, scale):
    kernels = {f"net{at}": scale * torch.randn(4, 3, 3, 3, requires_grad=True) for at in range(count)}
    plot_kernels(kernels, tmp_path / "kernels.png", title="a layer")
    assert width_of(tmp_path / "kernels.png") == pytest.approx(150 * (3.4 * count + 0.6), abs=1)


def test_equal_kernels_give_equal_files(tmp_path):
    kernel = torch.randn(4, 4, 3, 3)
    for name in ("a.png", "b.png"):
        plot_kernels({"net": kernel}, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("kernels", "text"),
    [
        ({}, "got 0"),
        ({str(at): torch.zeros(1, 1, 3, 3) for at in range(7)}, "got 7"),
        ({"net": torch.zeros(4, 4, 1, 1)}, r"net: .* got \[4, 4, 1, 1\]"),
        ({"net": torch.zeros(4, 4)}, r"got \[4, 4\]"),
    ],
)
def test_what_is_no_kernel_is_an_error(tmp_path, kernels, text):
    with pytest.raises(ValueError, match=text):
        plot_kernels(kernels, tmp_path / "kernels.png")
    assert not (tmp_path / "kernels.png").exists()


@pytest.mark.parametrize("layers", [1, 22])
def test_sensitivity_can_be_drawn(tmp_path, layers):
    plot_sensitivity({"RepOpt": report(layers), "RepVGG": report(layers)}, tmp_path / "plot.png")
    assert width_of(tmp_path / "plot.png") == 1650


@pytest.mark.parametrize("reports", [{}, {"net": report(0)}, {str(at): report(1) for at in range(5)}])
def test_no_sensitivity_is_an_error(tmp_path, reports):
    with pytest.raises(ValueError, match="got"):
        plot_sensitivity(reports, tmp_path / "plot.png")
