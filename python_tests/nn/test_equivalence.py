"""Every block computes one convolution, in float64: fused against unfused, and against what its branches say."""

import inspect
import itertools

import pytest
import torch
from torch.nn import functional

import repkern.nn
from repkern.nn import OREPAConv2d, OREPADeepStem, OREPARepVGGBlock, RepBlock

FUSED = 1e-12  # relative to the largest output
KERNELS = (1, 3, 5, 7)
EXPORTED = [getattr(repkern.nn, name) for name in repkern.nn.__all__]
BLOCKS = [kind for kind in EXPORTED if isinstance(kind, type) and issubclass(kind, RepBlock) and kind is not RepBlock]
SMALLEST = {OREPADeepStem: 5, OREPARepVGGBlock: 3}
# (in, out, groups): dense, grouped, many groups (2 Ci internal channels), depthwise, depthwise with a multiplier
CHANNELS = ((5, 7, 1), (4, 6, 2), (12, 6, 6), (6, 6, 6), (3, 6, 3), (6, 6, 1))


def images(channels, size=13):
    return torch.randn(2, channels, size, size + 2, dtype=torch.float64)


def check_fused(block, x, same):
    block.eval()
    before = {name: t.clone() for name, t in block.state_dict().items()}
    fused = block.fuse()
    same(fused(x), block(x), FUSED, "fused output")
    weight, bias = block.equivalent_kernel_bias()
    co, ci, g, k = block.out_channels, block.in_channels, block.groups, block.kernel_size[0]
    assert weight.shape == (co, ci // g, k, k)
    assert bias.shape == (co,)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name]), f"fuse() changed {name}"


@pytest.mark.parametrize(("kind", "k"), [(kind, k) for kind in BLOCKS for k in KERNELS if k >= SMALLEST.get(kind, 1)])
def test_strides_dilations_groups(kind, k, randomize, same):
    for (ci, co, g), (stride, dilation) in itertools.product(CHANNELS, ((1, 1), (2, 2), ((2, 1), 1), (1, (2, 3)))):
        block = randomize(kind(ci, co, k, stride, k // 2, dilation, g, dtype=torch.float64))
        check_fused(block, images(ci), same)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_padding_modes(kind, mode, randomize, same):
    k = SMALLEST.get(kind, 3)
    for padding, dilation in itertools.product({0, 1, k // 2, (1, 4), "same", "valid"}, (1, 2)):
        block = kind(4, 4, k, 1, padding, dilation, 2, padding_mode=mode, dtype=torch.float64)
        check_fused(randomize(block), images(4), same)


@pytest.mark.parametrize("scaling", ["vector", "scalar", "none"])
@pytest.mark.parametrize("k", [1, 3])
def test_scalings(scaling, k, randomize, same):
    block = randomize(OREPAConv2d(4, 6, k, padding=k // 2, scaling=scaling, dtype=torch.float64))
    check_fused(block, images(4), same)
    shape = {"vector": (len(block.branches), 6), "scalar": (len(block.branches), 1), "none": None}[scaling]
    assert (None if block.scale is None else tuple(block._scale_rows().shape)) == shape


@pytest.mark.parametrize("activation", [torch.nn.ReLU(), torch.nn.Hardswish()])
@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if "activation" in inspect.signature(kind).parameters])
def test_activations_stay(kind, activation, randomize, same):
    block = randomize(kind(4, 4, 5, activation=activation, dtype=torch.float64))
    check_fused(block, images(4), same)
    assert list(dict(block.fuse().named_children())) == ["conv", "activation"]


@pytest.mark.parametrize("kind", BLOCKS)
def test_gradients_of_the_equivalent_kernel_reach_every_parameter(kind, randomize):
    block = randomize(kind(4, 4, 5, dtype=torch.float64)).eval()
    weight, bias = block.equivalent_kernel_bias()
    (weight.square().sum() + bias.square().sum()).backward()
    for name, parameter in block.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


# --- the explicit multi-branch networks, on feature maps


def filters_on_maps(x, filters):
    return functional.conv2d(x, filters[:, None], groups=filters.shape[0])


def explicit_branches(conv, x):
    """The six branches as layers on feature maps. x is padded already, so that no branch pads in between."""
    g, k, ci = conv.groups, conv.kernel_size[0], conv.in_channels
    eye = torch.zeros_like(conv.reduce.weight)
    at = torch.arange(eye.shape[0])
    eye[at, at % (conv.internal_channels // g) % (ci // g)] = 1

    def one_by_one(y, weight):
        return functional.conv2d(y, weight[:, :, None, None], groups=g)

    reduce = conv.reduce.weight + eye if conv.identity_reduce else conv.reduce.weight
    outputs = {
        "origin": functional.conv2d(x, conv.origin.weight, groups=g),
        "1x1-KxK": functional.conv2d(one_by_one(x, reduce), conv.expand.weight, groups=g),
    }
    if k > 1:
        half = k // 2
        outputs |= {
            "avg": functional.avg_pool2d(one_by_one(x, conv.avg.weight), k, 1),
            "prior": filters_on_maps(one_by_one(x, conv.prior.weight), conv.prior_filter),
            "1x1": one_by_one(x, conv.pointwise.weight)[..., half:-half, half:-half],
            "dw-pw": one_by_one(functional.conv2d(x, conv.depthwise.weight[:, None], groups=ci), conv.project.weight),
        }
    total = None
    for row, branch in enumerate(conv.branches):
        scale = conv._scale_rows()[row] if conv.scale is not None else torch.ones(1, dtype=x.dtype)
        scaled = outputs[branch] * scale.reshape(-1, 1, 1)
        total = scaled if total is None else total + scaled
    return total + conv.bias.reshape(-1, 1, 1)


@pytest.mark.parametrize("scaling", ["vector", "scalar", "none"])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_training_step_equals_the_explicit_branches(k, channels, scaling, randomize, same):
    ci, co, g = channels
    conv = randomize(
        OREPAConv2d(ci, co, k, padding=k // 2, groups=g, scaling=scaling, expansion=3, dtype=torch.float64)
    )
    x = images(ci, 7).requires_grad_()
    squeezed = conv(x)
    explicit = explicit_branches(conv, functional.pad(x, [k // 2] * 4))
    same(squeezed, explicit, FUSED, "output")
    toward = torch.randn_like(squeezed)
    leaves = [x, *conv.parameters()]
    names = ["input", *(name for name, _ in conv.named_parameters())]
    got = torch.autograd.grad((squeezed * toward).sum(), leaves)
    expected = torch.autograd.grad((explicit * toward).sum(), leaves)
    for name, one, other in zip(names, got, expected, strict=True):
        same(one, other, 1e-10, f"gradient of {name}")


@pytest.mark.parametrize("factors", ["plain", "orepa", ("orepa", "plain", "orepa")])
@pytest.mark.parametrize("groups", [1, 2])
def test_deep_stem_equals_stacked_convolutions(factors, groups, randomize, same):
    stem = randomize(OREPADeepStem(4, 6, 7, 2, groups=groups, factors=factors, dtype=torch.float64)).train()
    x = images(4).requires_grad_()
    y = functional.pad(x, [3] * 4)
    for at, factor in enumerate(stem.factors):
        kernel = factor.squeezed_kernel() if isinstance(factor, OREPAConv2d) else factor.weight
        y = functional.conv2d(y, kernel, stride=2 if at == 2 else 1, groups=groups)
    stacked = functional.batch_norm(y, None, None, stem.bn.weight, stem.bn.bias, True, 0.1, stem.bn.eps)
    output = stem(x)
    same(output, stacked, FUSED, "output")
    toward = torch.randn_like(output)
    leaves = [x, *stem.parameters()]
    got = torch.autograd.grad((output * toward).sum(), leaves)
    expected = torch.autograd.grad((stacked * toward).sum(), leaves)
    for (name, _), one, other in zip([("input", x), *stem.named_parameters()], got, expected, strict=True):
        same(one, other, 1e-10, f"gradient of {name}")


@pytest.mark.parametrize(("channels", "stride"), [((4, 4, 1), 1), ((4, 4, 4), 1), ((4, 6, 2), 2)])
def test_repvgg_block_equals_three_normed_branches(channels, stride, randomize, same):
    ci, co, g = channels
    block = randomize(OREPARepVGGBlock(ci, co, 3, stride, groups=g, dtype=torch.float64)).train()
    assert (block.identity_bn is not None) == (ci == co and stride == 1)
    x = images(ci)

    def norm(y, bn):
        return functional.batch_norm(y, None, None, bn.weight, bn.bias, True, 0.1, bn.eps)

    expected = norm(functional.conv2d(x, block.dense.squeezed_kernel(), None, stride, 1, 1, g), block.dense_bn)
    expected = expected + norm(functional.conv2d(x, block.pointwise.weight, None, stride, 0, 1, g), block.pointwise_bn)
    if block.identity_bn is not None:
        expected = expected + norm(x, block.identity_bn)
    same(block(x), expected, FUSED, "train output")
