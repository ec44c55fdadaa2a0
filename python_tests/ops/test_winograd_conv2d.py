"""The public functions of winograd_conv2d: accuracy, edges, layouts, threads, and what is refused."""

import pytest
import torch
from torch.nn import functional

from repkern import testing
from repkern.bench.registry import conv_cases
from repkern.ops import (
    winograd_conv2d,
    winograd_conv2d_packed,
    winograd_pack_weight,
    winograd_transform_weight,
)
from repkern.ops.winograd_conv2d import reference

CPU = [target for target in testing.targets() if target.backend in ("reference", "cpu")]
TARGETS = [pytest.param(target, id=str(target)) for target in CPU]
# Relative L2 against float64 that a tile may reach in float32.
ALLOWED = {2: 1e-6, 4: 3e-6, 5: 3e-6, 6: 1e-5}
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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tile", [2, 4, 5, 6])
@pytest.mark.parametrize(("channels", "outputs", "size"), [(3, 16, 20), (64, 64, 13), (512, 48, 7), (2048, 16, 4)])
def test_float32_is_as_accurate_as_promised(tile, channels, outputs, size, target):
    x, weight = maps(2, channels, size, size).relu(), maps(outputs, channels, 3, 3, seed=1) / (9 * channels) ** 0.5
    wanted = functional.conv2d(x.float().double(), weight.float().double(), padding=1)
    with target.active():
        got = winograd_conv2d(x.float(), weight.float(), tile=tile)
    assert relative(got, wanted) <= ALLOWED[tile]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tile", [2, 4, 5, 6])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 2.5e-3), (torch.float16, 3e-4)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_half_maps_are_computed_in_float32(dtype, allowed, tile, memory_format, target):
    x, weight = maps(2, 35, 9, 11).to(dtype).contiguous(memory_format=memory_format), maps(37, 35, 3, 3).to(dtype)
    residual = maps(2, 37, 9, 11, seed=2).to(dtype).contiguous(memory_format=memory_format)
    wanted = functional.conv2d(x.double(), weight.double(), padding=1) + residual.double()
    with target.active():
        got = winograd_conv2d(x, weight, residual=residual, tile=tile)
    assert got.dtype == dtype
    # One rounding of the result, u / sqrt(3) in the mean at worst: 2^-9 and 2^-12.
    assert relative(got, wanted) <= allowed


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("tile", [2, 4, 5, 6])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_every_small_size(tile, padding, memory_format, target):
    weight = maps(5, 3, 3, 3, seed=1)
    for height in range(max(1, 3 - 2 * padding), tile + 3):
        for width in (max(1, 3 - 2 * padding), tile - 1 + 2, tile + 3):
            x = maps(2, 3, height, width).contiguous(memory_format=memory_format)
            wanted = functional.conv2d(x, weight, padding=padding)
            with target.active():
                got = winograd_conv2d(x, weight, padding=padding, tile=tile)
            testing.assert_close(got, wanted, 1e-11, f"{height} x {width}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("channels", "outputs", "groups"), [(33, 47, 1), (32, 64, 1), (40, 60, 2), (6, 6, 6)])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
def test_both_formats_give_the_same_values(channels, outputs, groups, activation, target):
    x, residual = maps(2, channels, 13, 10).float(), maps(2, outputs, 13, 10, seed=2).float()
    weight, bias = maps(outputs, channels // groups, 3, 3).float(), maps(outputs).float()
    results = []
    for memory_format in FORMATS:
        with target.active():
            y = winograd_conv2d(
                x.contiguous(memory_format=memory_format), weight, bias, groups=groups, activation=activation,
                residual=residual.contiguous(memory_format=memory_format),
            )  # fmt: skip
        assert y.is_contiguous(memory_format=memory_format)
        results.append(y)
    if target.backend == "cpu":
        assert torch.equal(*results)
    functions = {"none": lambda y: y, "relu": functional.relu, "relu6": functional.relu6}
    function = functions.get(activation) or getattr(functional, activation)
    wanted = functional.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=groups)
    assert relative(results[0], function(wanted + residual.double())) <= ALLOWED[4]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tile", [2, 4])
def test_nan_reaches_its_tile_and_no_other(tile, target):
    x, weight = torch.ones(1, 18, 12, 12), torch.ones(17, 18, 3, 3)
    x[0, 3, 5, 6] = torch.nan
    with target.active():
        broken = winograd_conv2d(x, weight, activation="relu", tile=tile)[0].isnan()
    wanted = functional.conv2d(x, weight, padding=1)[0].isnan()
    assert broken[wanted].all()
    tiles = wanted[0].unflatten(0, (-1, tile)).unflatten(2, (-1, tile)).any(3).any(1)
    assert not broken[:, ~tiles.repeat_interleave(tile, 0).repeat_interleave(tile, 1)].any()


@pytest.mark.parametrize("target", TARGETS)
def test_sliced_and_unaligned_inputs_give_the_same_bits(target):
    x, weight, bias = maps(2, 20, 9, 10).float(), maps(24, 20, 3, 3).float(), maps(24).float()
    raw = torch.empty(x.numel() + 1)
    unaligned = raw[1:].view_as(x).copy_(x)
    wide = torch.full((2, 23, 12, 14), torch.nan)
    sliced = wide[:, 2:22, 1:10, 3:13].copy_(x)
    with target.active():
        wanted = winograd_conv2d(x, weight, bias)
        for other in (unaligned, sliced):
            assert torch.equal(winograd_conv2d(other, weight, bias), wanted)
        spread = weight.repeat_interleave(2, 0)[::2]
        assert torch.equal(winograd_conv2d(x, spread, bias.repeat_interleave(2)[::2]), wanted)


@pytest.mark.parametrize("isa", [t for t in TARGETS if t.values[0].backend == "cpu"])
@pytest.mark.parametrize(("images", "channels", "outputs", "size", "groups"), [
    (1, 40, 100, 7, 1), (3, 32, 64, 30, 1), (1, 24, 48, 13, 2), (1, 21, 49, 7, 7), (1, 12, 120, 7, 3),
])  # fmt: skip
def test_the_result_depends_on_neither_threads_nor_batch(images, channels, outputs, size, groups, isa, threads):
    x = maps(images, channels, size, size).float()
    weight = maps(outputs, channels // groups, 3, 3).float()
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        for form in FORMATS:
            with isa.active():
                results.append(winograd_conv2d(x.contiguous(memory_format=form), weight, groups=groups))
    with isa.active():
        alone = winograd_conv2d(x[-1:], weight, groups=groups)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(alone, results[0][-1:])
    wanted = functional.conv2d(x.double(), weight.double(), padding=1, groups=groups)
    assert relative(results[0], wanted) <= ALLOWED[4]


def test_packed_weights_give_the_same_bits():
    x, weight, bias = maps(1, 7, 6, 6).float(), maps(9, 7, 3, 3).float(), maps(9).float()
    packed = winograd_transform_weight(weight, 4)
    assert packed.shape == (1, 1, 36, 7, 16)
    assert not packed[..., 9:].any()
    again = winograd_conv2d_packed(x, packed, bias, out_channels=9, tile=4, activation="relu")
    assert torch.equal(again, winograd_conv2d(x, weight, bias, activation="relu", tile=4))


def from_kernels(x, weight, bias=None, tile=4, groups=1, **options):
    packed = winograd_pack_weight(weight, groups=groups)
    return winograd_conv2d_packed(x, packed, bias, out_channels=weight.shape[0], tile=tile, groups=groups, **options)


def test_packed_kernels_hold_the_weight():
    weight = maps(36, 5, 3, 3).float()
    packed = winograd_pack_weight(weight, groups=2)
    assert packed.shape == (2, 2, 9, 5, 16)
    assert packed.dtype == torch.float32
    assert torch.equal(packed[1, 1, 4, 3, :2], weight[34:, 3, 1, 1])
    assert not packed[:, 1, ..., 2:].any()
    assert torch.equal(reference.unpack_weight(packed, 36), weight)
    assert winograd_pack_weight(weight.half()).dtype == torch.float32
    assert winograd_pack_weight(weight.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"\[K, C/g, 3, 3\], got \(6, 4, 5, 5\); other kernels: torch.conv2d"):
        winograd_pack_weight(torch.zeros(6, 4, 5, 5))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tile", [2, 4, 5, 6])
@pytest.mark.parametrize(("channels", "outputs", "size"), [(3, 16, 20), (192, 80, 13), (512, 48, 7), (2048, 16, 4)])
def test_packed_kernels_are_as_accurate_as_promised(tile, channels, outputs, size, target):
    x, weight = maps(2, channels, size, size).relu(), maps(outputs, channels, 3, 3, seed=1) / (9 * channels) ** 0.5
    wanted = functional.conv2d(x.float().double(), weight.float().double(), padding=1)
    with target.active():
        got = from_kernels(x.float(), weight.float(), tile=tile)
    assert relative(got, wanted) <= ALLOWED[tile]


@pytest.mark.parametrize("isa", [t for t in TARGETS if t.values[0].backend == "cpu"])
@pytest.mark.parametrize(("images", "channels", "outputs", "size", "groups"), [
    (1, 40, 100, 7, 1), (3, 200, 150, 14, 1), (2, 260, 290, 13, 2),
])  # fmt: skip
def test_packed_kernels_give_the_same_bits_for_threads_batches_and_formats(
    images, channels, outputs, size, groups, isa, threads
):
    x = maps(images, channels, size, size).float()
    weight, bias = maps(outputs, channels // groups, 3, 3).float(), maps(outputs).float()
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        for form in FORMATS:
            with isa.active():
                results.append(from_kernels(x.contiguous(memory_format=form), weight, bias, groups=groups))
    with isa.active():
        alone = from_kernels(x[-1:], weight, bias, groups=groups)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(alone, results[0][-1:])
    wanted = functional.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=groups)
    assert relative(results[0], wanted) <= ALLOWED[4]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("channels", [18, 260])
def test_nan_stays_in_its_tile_with_packed_kernels(tile, channels, target):
    x, weight = torch.ones(1, channels, 12, 12), torch.ones(70, channels, 3, 3)
    x[0, 3, 4, 4] = torch.nan
    with target.active():
        broken = from_kernels(x, weight, tile=tile)[0].isnan()
    assert broken[:, 3:6, 3:6].all()
    first, last = 3 // tile * tile, 5 // tile * tile + tile
    broken[:, first:last, first:last] = False
    assert not broken.any()


@pytest.mark.parametrize("target", TARGETS)
def test_packed_kernels_are_read_from_any_place(target):
    x, weight = maps(1, 70, 9, 10).float(), maps(40, 70, 3, 3).float()
    packed = winograd_pack_weight(weight)
    guarded = torch.full((packed.numel() + 65,), torch.nan)
    inside = guarded[33:-32].view_as(packed).copy_(packed)
    with target.active():
        wanted = winograd_conv2d_packed(x, packed, out_channels=40, tile=4)
        assert torch.equal(winograd_conv2d_packed(x, inside, out_channels=40, tile=4), wanted)
        spread = packed.repeat_interleave(2, 3)[:, :, :, ::2]
        assert torch.equal(winograd_conv2d_packed(x, spread, out_channels=40, tile=4), wanted)
    assert torch.isfinite(wanted).all()


def test_packed_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"`packed` must have shape \(1, 1, 36, 4, 16\), got \(1, 1, 9, 3, 16\)"):
        winograd_conv2d_packed(torch.zeros(X), torch.zeros(1, 1, 9, 3, 16), out_channels=6, tile=4)
    with pytest.raises(RuntimeError, match="has no gradient"):
        from_kernels(torch.zeros(X), torch.zeros(W, requires_grad=True))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_gradient_is_refused_with_advice(which):
    tensors = [torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3), torch.ones(3)]
    tensors[which].requires_grad_()
    with pytest.raises(RuntimeError, match=r"has no gradient.*torch.conv2d to train.*no_grad"):
        winograd_conv2d(*tensors)
    with torch.no_grad():
        assert winograd_conv2d(*tensors).shape == (1, 3, 4, 4)


X, W = (1, 4, 5, 5), (6, 4, 3, 3)


@pytest.mark.parametrize(
    ("x", "weight", "options", "match"),
    [
        (X, (6, 4, 5, 5), {}, r"\[K, C/g, 3, 3\], got \(6, 4, 5, 5\); other kernels: torch.conv2d"),
        (X, (6, 3, 3, 3), {}, r"takes 3 x 1 groups = 3 channels, but `x` has 4"),
        (X, W, {"padding": 3}, r"`padding` must be 0, 1 or 2, got 3; other paddings: torch.conv2d"),
        (X, W, {"tile": 3}, r"`tile` must be one of 2, 4, 5, 6, got 3"),
        (X, W, {"tile": "best"}, r"`tile` must be 'auto' or one of 2, 4, 5, 6, got 'best'"),
        (X, W, {"activation": "gelu"}, r"`activation` must be one of none, relu.*, got 'gelu'"),
        (X, (5, 2, 3, 3), {"groups": 2}, r"out_channels \(=5\) must be divisible by `groups` \(=2\)"),
        (X, W, {"residual": torch.zeros(1, 6, 4, 5)}, r"`residual` must have shape \(1, 6, 5, 5\), got \(1, 6, 4, 5\)"),
        ((4, 5, 5), W, {}, r"non-empty \[N, C, H, W\], got \(4, 5, 5\)"),
        ((0, 4, 5, 5), W, {}, r"non-empty \[N, C, H, W\], got \(0, 4, 5, 5\)"),
        ((1, 4, 2, 5), W, {"padding": 0}, r"padding 0 has no output on an input of \(2, 5\)"),
    ],
)
def test_what_does_not_fit_is_named(x, weight, options, match):
    with pytest.raises(ValueError, match=match):
        winograd_conv2d(torch.zeros(x), torch.zeros(weight), **options)


def test_dtypes_must_agree():
    with pytest.raises(
        TypeError, match=r"`weight` is torch.float64 but `x` is torch.float32; all must share one dtype"
    ):
        winograd_conv2d(torch.zeros(X), torch.zeros(W, dtype=torch.float64))


def test_cases_of_the_benchmark():
    assert [case.name for case in conv_cases("64,112 7,5")] == ["c64_112_n1", "c64_112_n8", "c7_5_n1", "c7_5_n8"]
    with pytest.raises(ValueError, match="channels,size with both at least 1, got '64,0'"):
        conv_cases("64,0")
