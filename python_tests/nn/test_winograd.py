"""WinogradConv2d stands in for nn.Conv2d in inference: values, state, and what it refuses."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern.nn import WinogradConv2d

# Relative L2 against float64 in float32, as the op's own tests have it.
LIMIT = {2: 1e-6, 4: 3e-6, 5: 3e-6, 6: 1e-5}


def relative(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


def conv(channels=16, outputs=24, **options):
    return nn.Conv2d(channels, outputs, 3, **{"padding": 1, **options}).requires_grad_(False)


@pytest.mark.parametrize("tile", [2, 4, 5, 6, "auto"])
@pytest.mark.parametrize("options", [{}, {"padding": 0}, {"padding": 2}, {"groups": 4}, {"bias": False}])
def test_same_as_the_convolution_it_is_made_from(tile, options):
    plain = conv(**options)
    x = torch.randn(2, 16, 13, 10)
    exact = copy.deepcopy(plain).double()(x.double())
    got = WinogradConv2d.from_conv(plain, tile)(x)
    assert relative(got, exact) <= LIMIT[4 if tile == "auto" else tile]


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_padding_modes(padding_mode):
    plain = conv(padding_mode=padding_mode)
    x = torch.randn(1, 16, 9, 7)
    exact = copy.deepcopy(plain).double()(x.double())
    assert relative(WinogradConv2d.from_conv(plain)(x), exact) <= LIMIT[4]


@pytest.mark.parametrize(("padding", "same_as"), [("same", 1), ("valid", 0)])
def test_named_padding(padding, same_as):
    layer = WinogradConv2d(4, 4, padding=padding)
    x = torch.randn(1, 4, 6, 6)
    expected = functional.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=same_as)
    assert relative(layer(x), expected) <= LIMIT[4]


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", functional.relu),
        (nn.ReLU6(), functional.relu6),
        (nn.SiLU(), functional.silu),
        ("hardswish", functional.hardswish),
    ],
)
def test_activation_and_residual(activation, function):
    plain = conv(outputs=16)
    x, residual = torch.randn(2, 2, 16, 8, 8).unbind()
    layer = WinogradConv2d.from_conv(plain, activation=activation)
    exact = function(copy.deepcopy(plain).double()(x.double()) + residual.double())
    assert relative(layer(x, residual), exact) <= LIMIT[4]


def test_unbatched_and_channels_last():
    layer = WinogradConv2d(8, 8, padding=1)
    x = torch.randn(1, 8, 7, 5)
    assert torch.equal(layer(x[0]), layer(x)[0])
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert relative(last, layer(x).double()) <= LIMIT[4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    plain = conv().to(dtype)
    x = torch.randn(1, 16, 8, 8, dtype=dtype)
    got = WinogradConv2d.from_conv(plain)(x)
    assert got.dtype == dtype
    assert relative(got, copy.deepcopy(plain).double()(x.double())) <= {torch.float64: 1e-13}.get(dtype, 6e-3)


def test_state_dict_is_that_of_conv2d_both_ways():
    plain, layer = conv(), WinogradConv2d(16, 24, padding=1)
    x = torch.randn(1, 16, 8, 8)
    before = layer(x)
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert not torch.allclose(layer(x), before)
    assert relative(layer(x), copy.deepcopy(plain).double()(x.double())) <= LIMIT[4]
    conv().load_state_dict(layer.state_dict(), strict=True)


def test_changed_weights_are_noticed():
    layer = WinogradConv2d.from_conv(conv())
    x = torch.randn(1, 16, 8, 8)
    first = layer(x)
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    assert torch.allclose(layer(x), 2 * first, rtol=1e-5, atol=1e-5)
    layer.weight = nn.Parameter(layer.weight / 2, requires_grad=False)
    layer.bias.div_(2)
    assert torch.allclose(layer(x), first, rtol=1e-5, atol=1e-5)
    layer.double()
    assert layer(x.double()).dtype == torch.float64


def test_filters_are_transformed_once(monkeypatch):
    import repkern.nn.winograd as module

    calls = []
    transform = module.winograd_transform_weight
    monkeypatch.setattr(
        module, "winograd_transform_weight", lambda *args, **more: calls.append(1) or transform(*args, **more)
    )
    layer = WinogradConv2d(4, 4, padding=1)
    with torch.inference_mode():
        for _ in range(3):
            layer(torch.randn(1, 4, 6, 6))
    assert len(calls) == 1


def test_copies_and_files():
    layer = WinogradConv2d.from_conv(conv(), activation="relu")
    x = torch.randn(1, 16, 8, 8)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_compiled_in_one_graph():
    layer = WinogradConv2d.from_conv(conv(), activation="relu")
    x = torch.randn(1, 16, 8, 8)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_several_threads():
    layer = WinogradConv2d.from_conv(conv())
    maps = [torch.randn(1, 16, 8 + at, 9) for at in range(8)]
    expected = [copy.deepcopy(layer)(x) for x in maps]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(layer, maps), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 5}, r"kernel_size must be \(3, 3\), got \(5, 5\).*direct_conv2d"),
        ({"stride": 2}, r"stride must be \(1, 1\), got \(2, 2\).*direct_conv2d"),
        ({"dilation": 2}, r"dilation must be"),
        ({"padding": 3}, r"padding must be 0, 1 or 2, got \(3, 3\)"),
        ({"tile": 3}, r"tile must be 'auto' or one of 2, 4, 5, 6, got 3"),
        ({"activation": "tanh"}, r"activation must be one of .* got 'tanh'"),
        ({"activation": nn.GELU()}, r"got 'GELU'"),
    ],
)
def test_what_it_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        WinogradConv2d(4, 4, **options)


def test_from_conv_refuses_strides():
    with pytest.raises(ValueError, match="stride must be"):
        WinogradConv2d.from_conv(nn.Conv2d(4, 4, 3, 2))
    with pytest.raises(TypeError, match=r"nn\.Conv2d is needed, got Linear"):
        WinogradConv2d.from_conv(nn.Linear(4, 4))


def test_gradients_are_refused():
    layer = WinogradConv2d(4, 4, padding=1)
    x = torch.randn(1, 4, 6, 6)
    with pytest.raises(RuntimeError, match=r"has no gradient.*torch\.conv2d"):
        layer(x.clone().requires_grad_())
    layer.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"parameters require gradients: use nn\.Conv2d"):
        layer(x)
    with torch.no_grad():
        layer(x)


def test_wrong_inputs():
    layer = WinogradConv2d(4, 4, padding=1)
    with pytest.raises(ValueError, match=r"\[N, 4, H, W\].*got \(1, 3, 6, 6\)"):
        layer(torch.randn(1, 3, 6, 6))
    with pytest.raises(TypeError, match=r"torch\.float64 but the weights are torch\.float32"):
        layer(torch.randn(1, 4, 6, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="non-empty"):
        layer(torch.randn(0, 4, 6, 6))
