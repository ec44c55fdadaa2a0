"""The public functions of direct_conv2d: both methods on every instruction set, accuracy, edges, refusals."""

import pytest
import torch
from torch.nn import functional

from repkern import _native, testing
from repkern.ops import OPS, direct_conv2d, direct_conv2d_packed, direct_pack_weight, direct_unpack_weight, use_backend
from repkern.testing.devices import Target

AMX = _native.native_build_info().get("isa_found") == "amx"
VECTORS = [target for target in testing.targets() if target.backend == "cpu"]
# (target, method): whole weights on every instruction set; split ones on tiles, and where they must be put together.
RUNS = [(target, "fma") for target in VECTORS] + [(target, "split") for target in VECTORS[-1:]]
RUNS += [(Target("cpu", "cpu", "amx"), "split")] if AMX else []
RUNS = [pytest.param(*run, id=f"{run[0]}-{run[1]}") for run in RUNS]
FORMATS = [torch.contiguous_format, torch.channels_last]
# Relative L2 against float64.
ALLOWED = 1e-6


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("target", "method"), [run for run in RUNS if run.values[1] == "split"])
@pytest.mark.parametrize("sample", testing.samples_of(OPS["direct_conv2d_packed"]), ids=str)
def test_split_weights_match_float64(sample, target, method):
    x, packed, bias, residual, outputs, kernel, stride, padding, dilation, groups, code = (
        value.float() if isinstance(value, torch.Tensor) else value for value in sample.args
    )
    weight = direct_unpack_weight(
        packed, out_channels=outputs, in_channels=x.shape[1], kernel_size=kernel, groups=groups
    )
    options = (outputs, kernel, stride, padding, dilation, groups, code)
    exact = [value if value is None else value.double() for value in (x, packed, bias, residual)]
    wanted = OPS["direct_conv2d_packed"].implementation("reference")(*exact, *options)
    (bound,) = testing.error_bounds(OPS["direct_conv2d_packed"], sample, torch.float32)
    with target.active():
        got = OPS["direct_conv2d_packed"](
            x, direct_pack_weight(weight, groups=groups, method=method), bias, residual, *options
        )
    assert got.is_contiguous(memory_format=torch.channels_last) or got.is_contiguous()
    testing.assert_close(got, wanted, bound, str(sample))


@pytest.mark.parametrize(("target", "method"), RUNS)
@pytest.mark.parametrize(
    ("channels", "kernel"), [(3, 3), (3, 7), (10, 3), (11, 3), (48, 3), (2048, 3), (2048, 1), (31, 1)]
)
def test_float32_is_as_accurate_as_promised(channels, kernel, target, method):
    x = maps(1, channels, 9, 9).relu()
    weight = maps(16, channels, kernel, kernel, seed=1) / (kernel**2 * channels) ** 0.5
    wanted = functional.conv2d(x.float().double(), weight.float().double(), padding=kernel // 2)
    with target.active():
        got = direct_conv2d(x.float(), weight.float(), padding=kernel // 2, method=method)
    assert relative(got, wanted) <= ALLOWED


@pytest.mark.parametrize(("target", "method"), RUNS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65])
def test_edges_of_blocks(channels, memory_format, target, method):
    outputs = {1: 33, 2: 1, 15: 16, 16: 15, 17: 32, 31: 49, 32: 17, 33: 64, 64: 31, 65: 48}[channels]
    for number, (kernel, stride, padding, dilation) in enumerate(
        [
            ((1, 1), 1, 0, 1),
            ((3, 3), 1, 1, 1),
            ((3, 3), 2, 1, 1),
            ((3, 2), (1, 3), (2, 0), (2, 1)),
            ((2, 3), 1, 1, (1, 2)),
        ]
    ):
        x = maps(2, channels, 7 + number, 17 - 2 * number).float().contiguous(memory_format=memory_format)
        weight, bias = maps(outputs, channels, *kernel, seed=1).float(), maps(outputs, seed=2).float()
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        wanted = functional.conv2d(x.double(), weight.double(), bias.double(), **options)
        with target.active():
            got = direct_conv2d(x, weight, bias, method=method, **options)
        assert got.is_contiguous(memory_format=memory_format) or channels == 1
        assert relative(got, wanted) <= ALLOWED, (kernel, options)


@pytest.mark.parametrize(("target", "method"), RUNS)
@pytest.mark.parametrize(
    ("channels", "outputs", "groups"), [(24, 24, 24), (13, 13, 13), (8, 32, 8), (40, 60, 2), (66, 99, 3)]
)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
def test_both_formats_give_the_same_bits(channels, outputs, groups, activation, target, method):
    x, residual = maps(2, channels, 13, 10).float(), maps(2, outputs, 7, 5, seed=2).float()
    weight, bias = maps(outputs, channels // groups, 3, 3).float(), maps(outputs).float()
    results = []
    for memory_format in FORMATS:
        with target.active():
            y = direct_conv2d(
                x.contiguous(memory_format=memory_format), weight, bias, groups=groups, activation=activation,
                residual=residual.contiguous(memory_format=memory_format), stride=2, padding=1, method=method,
            )  # fmt: skip
        assert y.is_contiguous(memory_format=memory_format)
        results.append(y)
    assert torch.equal(*results)
    functions = {"none": lambda y: y, "relu": functional.relu, "relu6": functional.relu6}
    function = functions.get(activation) or getattr(functional, activation)
    wanted = functional.conv2d(x.double(), weight.double(), bias.double(), stride=2, padding=1, groups=groups)
    assert relative(results[0], function(wanted + residual.double())) <= ALLOWED


@pytest.mark.parametrize(("target", "method"), RUNS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("channels", "stride", "dilation"), [(3, 2, 1), (18, 1, 1), (33, 1, 2), (64, 2, 1)])
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_other(
    channels, stride, dilation, value, target, method
):
    x, weight = torch.ones(1, channels, 12, 12), torch.rand(17, channels, 3, 3) + 0.1
    x[0, channels - 1, 5, 6] = value
    options = {"padding": 1, "stride": stride, "dilation": dilation}
    with target.active():
        broken = ~direct_conv2d(x, weight, activation="relu", method=method, **options).isfinite()
    assert torch.equal(broken, ~functional.conv2d(x, weight, **options).isfinite())


@pytest.mark.parametrize(("target", "method"), RUNS)
def test_sliced_and_unaligned_inputs_give_the_same_bits(target, method):
    x, weight, bias = maps(2, 20, 9, 10).float(), maps(24, 20, 3, 3).float(), maps(24).float()
    unaligned = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    wide = torch.full((2, 23, 12, 14), torch.nan)
    sliced = wide[:, 2:22, 1:10, 3:13].copy_(x)
    with target.active():
        wanted = direct_conv2d(x, weight, bias, stride=2, method=method)
        for other in (unaligned, sliced):
            assert torch.equal(direct_conv2d(other, weight, bias, stride=2, method=method), wanted)
        spread = weight.repeat_interleave(2, 0)[::2]
        assert torch.equal(direct_conv2d(x, spread, bias.repeat_interleave(2)[::2], stride=2, method=method), wanted)


@pytest.mark.parametrize(
    ("target", "method"), [run for run in RUNS if run.values[0].isa in ("scalar", "avx512", "amx")]
)
@pytest.mark.parametrize(("images", "channels", "outputs", "size", "groups", "stride"), [
    (1, 40, 100, 7, 1, 1), (3, 32, 64, 30, 1, 2), (2, 24, 48, 13, 2, 1), (5, 3, 20, 41, 1, 2), (1, 16, 32, 90, 1, 1),
    (2, 37, 37, 19, 37, 2),
])  # fmt: skip
def test_the_result_depends_on_neither_threads_nor_batch(
    images, channels, outputs, size, groups, stride, target, method, threads
):
    x = maps(images, channels, size, size).float()
    weight = maps(outputs, channels // groups, 3, 3).float()
    options = {"groups": groups, "stride": stride, "padding": 1, "method": method}
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        with target.active():
            results.append(direct_conv2d(x, weight, **options))
    with target.active():
        alone = direct_conv2d(x[-1:], weight, **options)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(alone, results[0][-1:])
    wanted = functional.conv2d(x.double(), weight.double(), groups=groups, stride=stride, padding=1)
    assert relative(results[0], wanted) <= ALLOWED


@pytest.mark.parametrize("method", ["fma", "split"])
@pytest.mark.parametrize(("shape", "groups"), [
    ((1, 1, 1, 1), 1), ((17, 3, 3, 3), 1), ((12, 40, 1, 1), 3), ((33, 11, 3, 3), 1), ((8, 32, 2, 3), 2),
    ((6, 1, 5, 7), 6),
])  # fmt: skip
def test_packing_is_undone_exactly(shape, groups, method):
    weight = maps(*shape).float() * torch.tensor(2.0) ** torch.randint(-60, 60, shape)
    packed = direct_pack_weight(weight, groups=groups, method=method)
    assert packed.dtype == (torch.float32 if method == "fma" else torch.bfloat16)
    sizes = {"out_channels": shape[0], "in_channels": shape[1] * groups, "groups": groups}
    assert torch.equal(direct_unpack_weight(packed, kernel_size=shape[2:], **sizes), weight)
    with pytest.raises(ValueError, match=r"`packed` must have shape .*, got"):
        direct_unpack_weight(packed, kernel_size=(shape[2], shape[3] + 40), **sizes)


def test_auto_splits_where_tiles_are_and_would_be_filled():
    target = Target("cpu", "cpu", "amx" if AMX else "scalar")
    with target.active():
        wide, depthwise = (
            direct_pack_weight(torch.ones(32, 3, 3, 3)),
            direct_pack_weight(torch.ones(8, 1, 3, 3), groups=8),
        )
    assert wide.dtype == (torch.bfloat16 if AMX else torch.float32)
    assert depthwise.dtype == torch.float32
    assert direct_pack_weight(torch.ones(32, 3, 3, 3).double()).dtype == torch.float64
    with VECTORS[0].active():
        assert direct_pack_weight(torch.ones(32, 3, 3, 3)).dtype == torch.float32


def test_packed_weights_give_the_same_bits():
    x, weight, bias = maps(1, 7, 6, 6).float(), maps(9, 7, 3, 3).float(), maps(9).float()
    packed = direct_pack_weight(weight)
    again = direct_conv2d_packed(
        x, packed, bias, out_channels=9, kernel_size=(3, 3), stride=(2, 2), padding=1, activation="relu"
    )
    assert torch.equal(again, direct_conv2d(x, weight, bias, stride=2, padding=1, activation="relu"))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_gradient_is_refused_with_advice(which):
    tensors = [torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3), torch.ones(3)]
    tensors[which].requires_grad_()
    with pytest.raises(RuntimeError, match=r"has no gradient.*torch.conv2d to train.*no_grad"):
        direct_conv2d(*tensors)
    with torch.no_grad():
        assert direct_conv2d(*tensors).shape == (1, 3, 2, 2)


X, W = (1, 4, 5, 5), (6, 4, 3, 3)


@pytest.mark.parametrize(
    ("x", "weight", "options", "match"),
    [
        (X, (6, 3, 3, 3), {}, r"takes 3 x 1 groups = 3 channels, but `x` has 4"),
        (X, (6, 4, 3), {}, r"non-empty \[K, C/g, kh, kw\], got \(6, 4, 3\)"),
        (X, W, {"padding": -1}, r"`padding` must be two numbers of at least 0, got \(-1, -1\)"),
        (X, W, {"stride": 0}, r"`stride` must be two numbers of at least 1, got \(0, 0\)"),
        (X, W, {"dilation": (1, 2, 3)}, r"`dilation` must be one number or two, got \(1, 2, 3\)"),
        (X, W, {"dilation": 3}, r"no output; got an input of \(5, 5\)"),
        (X, W, {"method": "best"}, r"`method` must be 'auto', 'fma', 'split', got 'best'"),
        (X, W, {"activation": "gelu"}, r"`activation` must be one of none, relu.*, got 'gelu'"),
        (X, (5, 2, 3, 3), {"groups": 2}, r"out_channels \(=5\) must be divisible by `groups` \(=2\)"),
        (X, W, {"residual": torch.zeros(1, 6, 4, 5)}, r"`residual` must have shape \(1, 6, 3, 3\), got \(1, 6, 4, 5\)"),
        ((4, 5, 5), W, {}, r"non-empty \[N, C, H, W\], got \(4, 5, 5\)"),
        ((0, 4, 5, 5), W, {}, r"non-empty \[N, C, H, W\], got \(0, 4, 5, 5\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(x, weight, options, match):
    with pytest.raises(ValueError, match=match):
        direct_conv2d(torch.zeros(x), torch.zeros(weight), **options)


def test_dtypes_must_agree():
    with pytest.raises(TypeError, match=r"`weight` is torch.float64 but `x` is torch.float32"):
        direct_conv2d(torch.zeros(X), torch.zeros(W, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"float32, float64, got torch.bfloat16; for half precision: torch.conv2d"):
        direct_conv2d_packed(torch.zeros(X).bfloat16(), torch.zeros(W), out_channels=6, kernel_size=3)
    split = direct_pack_weight(torch.zeros(W), method="split")
    with pytest.raises(TypeError, match=r"one dtype|must be one of float32, float64"):
        direct_conv2d_packed(torch.zeros(X).double(), split, out_channels=6, kernel_size=3)
    with pytest.raises(TypeError, match=r"method 'split' takes float32 weights, got torch.float64; use method 'fma'"):
        direct_pack_weight(torch.zeros(W).double(), method="split")


def test_backends_it_is_not_written_for_are_named():
    with use_backend("triton"), pytest.raises(RuntimeError, match="this op has it for reference, cpu only"):
        direct_conv2d(torch.zeros(X), torch.zeros(W))
