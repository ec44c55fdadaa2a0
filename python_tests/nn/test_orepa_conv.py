"""OREPAConv2d as a drop-in for nn.Conv2d: arguments, initial values, layouts, and the ways torch runs it."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from torch import nn

from repkern.nn import OREPABlock, OREPAConv2d, OREPADeepStem, OREPARepVGGBlock
from repkern.testing import assert_close

BLOCKS = (OREPAConv2d, OREPABlock, OREPADeepStem, OREPARepVGGBlock)


def images(dtype=torch.float32, channels=4):
    return torch.randn(2, channels, 9, 9, dtype=dtype)


def test_the_signature_begins_as_conv2ds():
    ours = list(inspect.signature(OREPAConv2d).parameters.values())
    theirs = list(inspect.signature(nn.Conv2d).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize(
    "arguments",
    [
        (4, 6, 3),
        (4, 6, (3, 3), 2, 1),
        (4, 6, 5, (2, 1), (1, 2), (1, 2), 2, False),
        (4, 4, 1, 1, "same", 1, 1, True, "circular"),
    ],
)
def test_attributes_are_conv2ds(arguments):
    ours, theirs = OREPAConv2d(*arguments), nn.Conv2d(*arguments)
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    for name in names.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.bias is None) == (theirs.bias is None)
    assert ours(images()).shape == theirs(images()).shape
    assert ours(images()[0]).shape == theirs(images()[0]).shape
    for text in theirs.extra_repr().split(", "):
        assert text in ours.extra_repr()


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((4, 6, 4), {}, "kernel_size must be odd.*got 4; use 3 or 5"),
        ((4, 6, (3, 5)), {}, r"kernel_size must be square, got \(3, 5\); keep nn.Conv2d"),
        ((4, 6, 0), {}, "kernel_size must be at least 1, got 0"),
        ((0, 6, 3), {}, "in_channels must be at least 1, got 0"),
        ((4, -1, 3), {}, "out_channels must be at least 1, got -1"),
        ((4, 6, 3), {"groups": 0}, "groups must be at least 1, got 0"),
        ((5, 6, 3), {"groups": 2}, r"in_channels \(=5\) must be divisible by groups \(=2\)"),
        ((4, 7, 3), {"groups": 2}, r"out_channels \(=7\) must be divisible by groups \(=2\)"),
        ((4, 6, 3), {"stride": 0}, "stride must be at least 1, got 0"),
        ((4, 6, 3), {"padding": -1}, "padding must be at least 0, got -1"),
        ((4, 6, 3), {"padding": "full"}, "padding must be 'same', 'valid' or numbers, got 'full'"),
        ((4, 6, 3), {"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
        ((4, 6, 3), {"padding_mode": "mirror"}, "padding_mode must be one of zeros, .*got 'mirror'"),
        ((4, 6, 3), {"stride": (1, 2, 3)}, r"stride must be an integer or a pair, got \(1, 2, 3\)"),
        ((4, 6, 3), {"scaling": "matrix"}, "scaling must be one of vector, scalar, none, got 'matrix'"),
        ((4, 6, 3), {"groups": 2, "internal_channels": 3}, r"internal_channels \(=3\) must be a positive multiple"),
        ((4, 6, 3), {"expansion": 0}, "expansion must be at least 1, got 0"),
        ((4, 6, 3), {"branches": ("avg",)}, "branches must name 'origin'"),
        ((4, 6, 1), {"branches": ("origin", "avg")}, "branches must name 'origin' and any of origin, 1x1-KxK"),
    ],
)
def test_bad_arguments(arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        OREPAConv2d(*arguments, **keywords)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_bad_dtypes(dtype):
    with pytest.raises(TypeError, match=f"got {dtype}"):
        OREPAConv2d(4, 6, 3, dtype=dtype)


def test_more_bad_arguments():
    with pytest.raises(TypeError, match=r"in_channels must be an integer, got 4\.5"):
        OREPAConv2d(4.5, 6, 3)
    with pytest.raises(TypeError, match=r"activation must be an nn\.Module instance"):
        OREPABlock(4, 6, 3, activation=nn.ReLU)
    with pytest.raises(ValueError, match="kernel_size must be at least 5, got 3"):
        OREPADeepStem(4, 6, 3)
    with pytest.raises(ValueError, match="factors must be 'orepa' or 'plain', or 3 of them"):
        OREPADeepStem(4, 6, 7, factors=("plain", "orepa"))
    with pytest.raises(ValueError, match="kernel_size must be at least 3"):
        OREPARepVGGBlock(4, 6, 1)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (4, 9), (1, 2, 4, 9, 9)])
def test_a_wrong_input_names_both_shapes(kind, shape):
    with pytest.raises(ValueError, match=rf"\[\(N,\) 4, H, W\], got \({', '.join(map(str, shape))}\)"):
        kind(4, 6, 5)(torch.zeros(shape))


@pytest.mark.parametrize("kind", BLOCKS)
def test_an_empty_batch(kind):
    block = kind(4, 6, 5).eval()
    output = block(torch.zeros(0, 4, 9, 9))
    assert output.shape[:2] == (0, 6)
    output.sum().backward()
    assert all(not p.grad.any() for p in block.parameters() if p.grad is not None)


def test_nan_parameters_go_through():
    conv = OREPAConv2d(4, 6, 3)
    conv.reduce.weight.data[0, 0] = float("nan")
    assert conv(images()).isnan().any()


# --- initial values


def largest(tensor):
    return float(tensor.detach().abs().max())


def rms(tensor):
    return float(tensor.detach().square().mean().sqrt())


def test_initial_values_are_the_papers():
    conv = OREPAConv2d(64, 64, 3)
    expected = {"origin": 0.25, "avg": 0.5, "prior": 0.0, "1x1-KxK": 0.5, "1x1": 1.0, "dw-pw": 0.5}
    assert conv.branches == tuple(expected)
    for row, branch in enumerate(conv.branches):
        assert torch.equal(conv._scale_rows()[row], torch.full((64,), expected[branch])), branch
    assert not conv.reduce.weight.any()
    assert conv.identity_reduce
    fan_in = {"origin": 576, "avg": 64, "prior": 64, "pointwise": 64, "expand": 576, "depthwise": 9, "project": 512}
    for name, fan in fan_in.items():  # kaiming-uniform, a=0: U(-b, b) with b = sqrt(6 / fan)
        weight, bound = getattr(conv, name).weight, math.sqrt(6 / fan)
        assert weight.abs().max() <= bound
        assert rms(weight) == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    # field measurement of the released code at 64 -> 64, whose pooling branch is half as large
    assert rms(conv.squeezed_kernel()) == pytest.approx(0.079, rel=0.05)


@pytest.mark.parametrize(("ci", "co", "groups"), [(16, 32, 1), (32, 16, 1), (16, 16, 1), (16, 32, 2), (32, 16, 4)])
def test_rep_1x1_starts_as_the_released_one(ci, co, groups):
    conv = OREPAConv2d(ci, co, 1, groups=groups)
    assert torch.equal(conv._scale_rows()[:, 0], torch.tensor([1.0, 0.5]))
    assert conv.internal_channels == min(ci, co)
    # One of the two 1x1 layers is an identity, so their product is the other.
    other = conv.expand.weight.flatten(1) if co > ci else conv.reduce.weight
    product = (conv.squeezed_kernel() - conv.origin.weight).flatten(1)
    torch.testing.assert_close(product, 0.5 * other, rtol=1e-6, atol=1e-7)
    assert rms(conv.origin.weight) == pytest.approx(math.sqrt(1 / (ci // groups)), rel=0.15)


def test_scaling_none_starts_as_the_same_kernel():
    torch.manual_seed(3)
    scaled = OREPAConv2d(8, 8, 3)
    torch.manual_seed(3)
    plain = OREPAConv2d(8, 8, 3, scaling="none")
    assert plain.scale is None
    torch.testing.assert_close(plain.squeezed_kernel(), scaled.squeezed_kernel(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("scaling", ["vector", "scalar", "none"])
@pytest.mark.parametrize("groups", [1, 4])
def test_initial_plain_is_the_papers_start_as_large_as_conv2ds(kernel_size, scaling, groups):
    def fresh(kind, **keywords):
        torch.manual_seed(0)
        return kind(32, 64, kernel_size, groups=groups, **keywords).double()

    paper, plain = (fresh(OREPAConv2d, scaling=scaling, initial=initial) for initial in ("paper", "plain"))
    size = plain.weight.norm()
    torch.testing.assert_close(size, fresh(nn.Conv2d).weight.norm(), rtol=0.05, atol=0)
    torch.testing.assert_close(plain.weight, paper.weight * (size / paper.weight.norm()), rtol=1e-5, atol=1e-7)
    if scaling != "none":
        assert torch.equal(plain.scale.weight, paper.scale.weight)
    assert "initial=plain" in repr(plain)
    assert "initial" not in repr(paper)


def test_initial_plain_of_some_branches_in_half_precision_and_on_meta():
    half = OREPABlock(8, 16, 3, initial="plain", dtype=torch.float16).conv
    torch.testing.assert_close(half.wide_kernel().norm(), torch.tensor(16 / 3).sqrt(), rtol=1e-2, atol=0)
    few = OREPAConv2d(8, 16, 3, branches=("origin", "1x1"), initial="plain")
    torch.testing.assert_close(few.weight.norm(), torch.tensor(16 / 3).sqrt(), rtol=1e-5, atol=0)
    later = OREPAConv2d(8, 16, 3, initial="plain", device="meta").to_empty(device="cpu")
    later.reset_parameters()
    torch.testing.assert_close(later.weight.norm(), torch.tensor(16 / 3).sqrt(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="initial must be one of paper, plain, got 'small'"):
        OREPAConv2d(8, 16, 3, initial="small")


@pytest.mark.parametrize(("groups", "internal"), [(1, 16), (4, 16), (8, 32), (16, 32)])
def test_internal_channels_by_default(groups, internal):
    assert OREPAConv2d(16, 16, 3, groups=groups).internal_channels == internal


def test_meta_then_empty_then_reset():
    conv = OREPAConv2d(4, 6, 3, device="meta").to_empty(device="cpu")
    conv.reset_parameters()
    assert torch.equal(conv.prior_filter, OREPAConv2d(4, 6, 3).prior_filter)
    assert conv(images()).isfinite().all()


# --- layouts


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("module_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
def test_output_layout_is_conv2ds(module_format, input_format):
    x = images().to(memory_format=input_format)
    ours = OREPAConv2d(4, 6, 3).to(memory_format=module_format)
    theirs = nn.Conv2d(4, 6, 3).to(memory_format=module_format)
    assert is_channels_last(ours(x)) == is_channels_last(theirs(x))
    assert all(p.is_contiguous() for p in ours.parameters())
    assert is_channels_last(ours.fuse().weight) == is_channels_last(theirs.weight)
    squeezed = ours.squeezed_kernel(memory_format=ours.kernel_format(x))
    assert is_channels_last(squeezed) == (torch.channels_last in (module_format, input_format))


def test_a_channels_last_module_stays_one_until_told():
    conv = OREPAConv2d(4, 6, 3).to(memory_format=torch.channels_last).double()
    assert conv.kernel_format() is torch.channels_last
    assert copy.deepcopy(conv).kernel_format() is torch.channels_last
    assert conv.to(memory_format=torch.contiguous_format).kernel_format() is torch.contiguous_format


def test_an_input_with_gaps():
    conv, x = OREPAConv2d(4, 6, 3), torch.randn(2, 4, 9, 18)
    assert torch.equal(conv(x[..., ::2]), conv(x[..., ::2].contiguous()))


# --- the ways torch runs a module


@pytest.mark.parametrize("kind", BLOCKS)
def test_state_dict_pickle_and_deepcopy(kind, randomize):
    block, x = randomize(kind(4, 6, 5)).eval(), images()
    other = kind(4, 6, 5).eval()
    other.load_state_dict(block.state_dict())
    assert not any("prior_filter" in name for name in block.state_dict())
    saved = io.BytesIO()
    torch.save(block, saved)
    saved.seek(0)
    for again in (
        other,
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(again(x), block(x))


@pytest.mark.parametrize("kind", BLOCKS)
def test_compiles_into_one_graph(kind, randomize):
    block, x = randomize(kind(4, 6, 5)), images()
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    block(x).square().sum().backward()
    for (name, one), other in zip(compiled.named_parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_compiles_under_autocast_and_channels_last():
    conv, x = OREPAConv2d(4, 6, 3), images().to(memory_format=torch.channels_last)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return conv(x)

    assert step(x).dtype is torch.bfloat16
    assert is_channels_last(step(x))


@pytest.mark.parametrize("kind", BLOCKS)
def test_exports_fused_and_unfused(kind, randomize):
    block, x = randomize(kind(4, 6, 5)).eval(), images()
    for module in (block, block.fuse()):
        program = torch.export.export(module, (x,))
        got, expected = program.module()(x), module(x)
        if module is block and block.has_norm:
            # An exported program computes norms and sums with torch's own operators, which round elsewhere.
            assert_close(got, expected, 16 * torch.finfo(torch.float32).eps * largest(expected), "exported")
        else:
            assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", BLOCKS)
def test_autocast(kind, randomize):
    block, x = randomize(kind(4, 6, 5)).eval(), images()
    with torch.autocast("cpu", torch.bfloat16):
        output = block(x)
    assert output.dtype is torch.bfloat16
    output.float().square().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in block.parameters())
    exact = copy.deepcopy(block).double()(x.double())
    eps = torch.finfo(torch.bfloat16).eps
    # kernel, image, output and each norm's input round once; errors of the sum of products grow with its square root
    assert largest(output.double() - exact) <= 16 * eps * largest(exact)


def test_autocast_casts_the_kernel_where_it_is_made():
    conv = OREPAConv2d(4, 6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.kernel_dtype("cpu") is torch.bfloat16
        assert conv.double().kernel_dtype("cpu") is torch.float64
    assert conv.half().kernel_dtype("cpu") is torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules(dtype):
    conv, x = OREPAConv2d(4, 6, 3).to(dtype), images(dtype)
    output = conv(x)
    assert output.dtype is dtype
    output.sum().backward()
    assert conv.origin.weight.grad.dtype is dtype
    assert conv.fuse().weight.dtype is dtype
    assert torch.equal(conv.fuse()(x), output)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    conv, x = OREPAConv2d(4, 6, 3, dtype=torch.float64), images(torch.float64).requires_grad_()
    expected = torch.autograd.grad(conv(x).square().sum(), list(conv.parameters()))
    torch.utils.checkpoint.checkpoint(conv, x, use_reentrant=reentrant).square().sum().backward()
    for (name, parameter), wanted in zip(conv.named_parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, wanted), name


def test_no_gradient_is_needed_anywhere():
    conv = OREPAConv2d(4, 6, 3).requires_grad_(False)
    assert not conv(images()).requires_grad
    with torch.inference_mode():
        assert conv(images()).shape == (2, 6, 7, 7)


def test_partly_frozen_branches():
    conv = OREPAConv2d(4, 6, 3)
    conv.origin.weight.requires_grad_(False)
    conv(images()).sum().backward()
    assert conv.origin.weight.grad is None
    assert conv.expand.weight.grad.any()
