"""winograd_stride2_conv2d against torch.conv2d in float64: accuracy, sizes, threads, dtypes, what it refuses."""

import pytest
import torch
from torch.nn import functional

from repkern import testing
from repkern.ops import (
    winograd_pack_weight,
    winograd_stride2_conv2d,
    winograd_stride2_conv2d_packed,
    winograd_stride2_transform_weight,
)

CPU = [target for target in testing.targets() if target.backend in ("reference", "cpu")]
TARGETS = [pytest.param(target, id=str(target)) for target in CPU]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


def from_kernels(x, weight, bias=None, **options):
    return winograd_stride2_conv2d_packed(
        x, winograd_pack_weight(weight), bias, out_channels=weight.shape[0], **options
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("run", [winograd_stride2_conv2d, from_kernels])
@pytest.mark.parametrize(("channels", "outputs", "size"), [(3, 16, 20), (192, 80, 13), (512, 48, 7), (2048, 16, 8)])
def test_float32_is_as_accurate_as_promised(channels, outputs, size, run, target):
    x, weight = maps(2, channels, size, size).relu(), maps(outputs, channels, 3, 3, seed=1) / (9 * channels) ** 0.5
    wanted = functional.conv2d(x.float().double(), weight.float().double(), stride=2, padding=1)
    with target.active():
        got = run(x.float(), weight.float())
    assert relative(got, wanted) <= 1e-6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_every_small_size(padding, memory_format, target):
    weight = maps(5, 3, 3, 3, seed=1)
    for height in range(max(1, 3 - 2 * padding), 12):
        for width in (max(1, 3 - 2 * padding), 7, 8, 9, 10, 18):
            x = maps(2, 3, height, width).contiguous(memory_format=memory_format)
            wanted = functional.conv2d(x, weight, stride=2, padding=padding)
            with target.active():
                for run in (winograd_stride2_conv2d, from_kernels):
                    testing.assert_close(run(x, weight, padding=padding), wanted, 1e-11, f"{height} x {width}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 2.5e-3), (torch.float16, 3e-4)])
def test_half_maps_are_computed_in_float32(dtype, allowed, target):
    x, weight = maps(2, 35, 9, 11).to(dtype), maps(37, 35, 3, 3).to(dtype)
    wanted = functional.conv2d(x.double(), weight.double(), stride=2, padding=1).relu()
    with target.active():
        got = winograd_stride2_conv2d(x, weight, activation="relu")
    assert got.dtype == dtype
    assert relative(got, wanted) <= allowed


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("pack", [winograd_stride2_transform_weight, winograd_pack_weight])
def test_the_bits_depend_on_neither_threads_nor_batch(pack, memory_format, threads):
    x = maps(5, 130, 29, 31).float().contiguous(memory_format=memory_format)
    packed = pack(maps(70, 130, 3, 3, seed=1).float())
    threads(1)
    wanted = winograd_stride2_conv2d_packed(x, packed, out_channels=70)
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(winograd_stride2_conv2d_packed(x, packed, out_channels=70), wanted)
        one = winograd_stride2_conv2d_packed(x[2:3], packed, out_channels=70)
        assert torch.equal(one, wanted[2:3])


@pytest.mark.parametrize("target", TARGETS)
def test_nan_and_infinity_stay_in_their_tile(target):
    x, weight = maps(1, 3, 32, 32).float(), maps(4, 3, 3, 3, seed=1).float()
    wanted = functional.conv2d(x.double(), weight.double(), stride=2, padding=1)
    for value in (float("nan"), float("inf")):
        x[0, 1, 12, 12] = value  # read by output 6 alone: of the tile 4 to 7
        with target.active():
            got = winograd_stride2_conv2d(x, weight)
        assert not torch.isfinite(got[0, :, 6, 6]).any()
        got[0, :, 4:8, 4:8] = wanted[0, :, 4:8, 4:8].float()
        assert relative(got, wanted) <= 1e-6


def test_gradients_are_refused():
    x, weight = torch.zeros(1, 3, 4, 4), torch.zeros(3, 3, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"has no gradient; it is for inference: use torch.conv2d"):
        winograd_stride2_conv2d(x, weight)
    with pytest.raises(RuntimeError, match=r"has no gradient; it is for inference: use torch.conv2d"):
        winograd_stride2_conv2d(x.requires_grad_(), weight.detach())


@pytest.mark.parametrize(
    ("x", "weight", "options", "match"),
    [
        ((1, 4, 5, 5), (6, 4, 5, 5), {}, r"\[K, C/g, 3, 3\], got \(6, 4, 5, 5\); other kernels: torch.conv2d"),
        ((1, 4, 5, 5), (6, 3, 3, 3), {}, r"takes 3 x 1 groups = 3 channels, but `x` has 4"),
        ((1, 4, 5, 5), (6, 4, 3, 3), {"padding": 3}, r"`padding` must be 0, 1 or 2, got 3; other"),
        ((1, 4, 2, 5), (6, 4, 3, 3), {"padding": 0}, r"padding 0 has no output on an input of \(2, 5\)"),
        (
            (1, 4, 5, 5), (6, 4, 3, 3), {"residual": torch.zeros(1, 6, 5, 5)},
            r"`residual` must have shape \(1, 6, 3, 3\), got \(1, 6, 5, 5\)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(x, weight, options, match):
    with pytest.raises(ValueError, match=match):
        winograd_stride2_conv2d(torch.zeros(x), torch.zeros(weight), **options)
