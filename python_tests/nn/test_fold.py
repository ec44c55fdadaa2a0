"""The algebra of repkern.nn.fold, against the layers it stands for."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern.nn import fold

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def kernel(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_fuse_bn(bias, affine, randomize, same):
    conv, norm = nn.Conv2d(4, 6, 3, groups=2, bias=bias).double(), nn.BatchNorm2d(6, affine=affine).double().eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    if affine:
        norm.weight.data.normal_(), norm.bias.data.normal_()
    x = kernel(2, 4, 7, 7)
    weight, shift = fold.fuse_bn(conv.weight, conv.bias, norm)
    same(functional.conv2d(x, weight, shift, groups=2), norm(conv(x)), 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_stay(dtype):
    norm = nn.BatchNorm2d(4, dtype=dtype)
    weight, bias = kernel(4, 4, 3, 3, dtype=dtype), kernel(4, dtype=dtype)
    for result in (
        fold.fuse_bn(weight, bias, norm),
        fold.add_branches([(weight, bias), (weight, bias)]),
        fold.compose_sequential((weight, bias), (weight, bias)),
        (fold.pad_to(weight, 5), fold.depthwise_to_dense(weight[:, :1], 4)),
        (fold.identity_kernel(4, 3, 2, dtype=dtype), fold.average_kernel(4, 3, dtype=dtype)),
        (fold.dct_kernel(4, 3, dtype=dtype),),
    ):
        assert {t.dtype for t in result} == {dtype}


def test_fuse_bn_says_what_does_not_fit():
    with pytest.raises(ValueError, match="track_running_stats=False"):
        fold.fuse_bn(kernel(4, 4, 3, 3), None, nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="5 channels but the weight has 4 outputs"):
        fold.fuse_bn(kernel(4, 4, 3, 3), None, nn.BatchNorm2d(5))


@pytest.mark.parametrize(("one", "two"), [(True, True), (True, False), (False, True), (False, False)])
def test_add_branches(one, two, same):
    x, parts = kernel(1, 4, 6, 6), []
    for has_bias in (one, two):
        parts.append((kernel(6, 2, 3, 3), kernel(6) if has_bias else None))
    weight, bias = fold.add_branches(parts)
    expected = sum(functional.conv2d(x, w, b, groups=2) for w, b in parts)
    same(functional.conv2d(x, weight, bias, groups=2), expected, 1e-13)
    assert (bias is None) == (not one and not two)


def test_add_branches_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\(4, 4, 3, 3\) and \(4, 4, 1, 1\); use pad_to"):
        fold.add_branches([(kernel(4, 4, 3, 3), None), (kernel(4, 4, 1, 1), None)])
    with pytest.raises(ValueError, match="at least one"):
        fold.add_branches([])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_pad_to(size, same):
    x, weight = kernel(1, 4, 9, 9), kernel(6, 4, size, size)
    padded = functional.conv2d(x, fold.pad_to(weight, 5), padding=2)
    same(padded, functional.conv2d(x, weight, padding=size // 2), 1e-13)


@pytest.mark.parametrize(("size", "wanted"), [(3, 1), (3, 4)])
def test_pad_to_needs_a_centre(size, wanted):
    with pytest.raises(ValueError, match=rf"\({size}, {size}\) kernel has no centred place in size {wanted}"):
        fold.pad_to(kernel(4, 4, size, size), wanted)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("k1", "k2"), [(1, 3), (3, 1), (3, 3), (5, 3)])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_compose_sequential(groups, k1, k2, biases, same):
    first = (kernel(8, 6 // groups, k1, k1), kernel(8) if biases[0] else None)
    second = (kernel(4, 8 // groups, k2, k2), kernel(4) if biases[1] else None)
    x = kernel(2, 6, 9, 9)
    stacked = functional.conv2d(functional.conv2d(x, *first, groups=groups), *second, groups=groups)
    weight, bias = fold.compose_sequential(first, second, groups=groups)
    same(functional.conv2d(x, weight, bias, groups=groups), stacked, 1e-13)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_identity_and_average(groups, size, same):
    x = kernel(2, 4, 8, 8)
    identity = fold.identity_kernel(4, size, groups, dtype=x.dtype)
    assert torch.equal(functional.conv2d(x, identity, padding=size // 2, groups=groups), x)
    average = fold.average_kernel(4, size, groups, dtype=x.dtype)
    expected = functional.avg_pool2d(x, size, 1, size // 2)
    same(functional.conv2d(x, average, padding=size // 2, groups=groups), expected, 1e-13)


def test_identity_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"channels \(=5\) must be divisible by groups \(=2\)"):
        fold.identity_kernel(5, 3, 2)
    with pytest.raises(ValueError, match="must be odd, got 4"):
        fold.identity_kernel(4, 4)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("expansion", [1, 3])
def test_depthwise_to_dense(groups, expansion, same):
    weight, x = kernel(6 * expansion, 1, 3, 3), kernel(1, 6, 7, 7)
    dense = fold.depthwise_to_dense(weight, 6, groups)
    assert dense.shape == (6 * expansion, 6 // groups, 3, 3)
    same(functional.conv2d(x, dense, groups=groups), functional.conv2d(x, weight, groups=6), 1e-13)


def test_depthwise_to_dense_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"got \(6, 2, 3, 3\)"):
        fold.depthwise_to_dense(kernel(6, 2, 3, 3), 6)
    with pytest.raises(ValueError, match=r"in_channels \(=6\) must be divisible by groups \(=4\)"):
        fold.depthwise_to_dense(kernel(6, 1, 3, 3), 6, 4)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_response_to_constant(groups, memory_format, same):
    weight = torch.randn(6, 6 // groups, 3, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    value = torch.randn(6, dtype=torch.float64)
    image = value[None, :, None, None].expand(1, 6, 3, 5)
    expected = torch.nn.functional.conv2d(image, weight, groups=groups).flatten()
    same(fold.response_to_constant(weight, value, groups=groups), expected, 1e-14, "response")
