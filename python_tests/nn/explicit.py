"""Branches computed one by one on a padded input, as the papers write them: what blocks are compared with."""

import copy
import pickle

import torch
from torch import nn
from torch.nn import functional

from repkern import reparameterize, replace_convs
from repkern.nn import RepBlock
from repkern.testing import assert_close

FUSED = 1e-12  # float64, relative to the largest value
GRADIENT = 1e-10
# (in, out, groups, K, stride, padding, dilation, padding_mode): every one at least twice, identity or not
GEOMETRIES = (
    (4, 4, 1, 3, 1, None, 1, "zeros"),
    (4, 6, 2, 3, 2, 1, 1, "zeros"),
    (4, 4, 2, 5, 1, None, 2, "reflect"),
    (6, 6, 6, 3, 1, None, 2, "zeros"),
    (3, 6, 3, 5, (2, 1), (1, 4), 1, "circular"),
    (4, 4, 1, 3, 1, 0, 2, "zeros"),
    (4, 4, 2, 3, 1, (0, 3), 1, "replicate"),
    (5, 5, 1, 1, 1, None, 1, "zeros"),
    (4, 6, 2, 1, 2, 1, 1, "zeros"),
)


def make(kind, geometry, **options):
    ci, co, groups, *rest, mode = geometry
    return kind(ci, co, *rest, groups, padding_mode=mode, dtype=torch.float64, **options)


def images(channels, size=11, dtype=torch.float64):
    return torch.randn(3, channels, size, size + 2, dtype=dtype)


def padded(block, x):
    height, width = block._pad
    mode = "constant" if block.padding_mode == "zeros" else block.padding_mode
    return functional.pad(x, (width, width, height, height), mode=mode)


def convolved(block, x, weight):
    """The branch whose kernel [Co, Ci/g, KH, KW] (each K or 1) lies in the middle of the block's."""
    y = padded(block, x)
    for axis in (0, 1):
        strip = (block.kernel_size[axis] - weight.shape[2 + axis]) // 2 * block.dilation[axis]
        y = y.narrow(2 + axis, strip, y.shape[2 + axis] - 2 * strip)
    return functional.conv2d(y, weight, None, block.stride, 0, block.dilation, block.groups)


def normed(y, norm):
    """In train mode, without running statistics."""
    return functional.batch_norm(y, None, None, norm.weight, norm.bias, True, 0.1, norm.eps)


def check_training(block, expected, same, what=""):
    """Output and every gradient of `block` in train mode against `expected(x)`."""
    x = images(block.in_channels).requires_grad_()
    got, wanted = block.train()(x), expected(x)
    same(got, wanted, FUSED, f"{what} output")
    toward = torch.randn_like(got)
    named = [("input", x), *((name, p) for name, p in block.named_parameters() if p.requires_grad)]
    leaves = [tensor for _, tensor in named]
    ours = torch.autograd.grad((got * toward).sum(), leaves)
    theirs = torch.autograd.grad((wanted * toward).sum(), leaves)
    # A norm makes some gradients exactly zero; what is left of those is rounding of the size of the others.
    size = max(float(gradient.abs().max()) for gradient in theirs)
    for (name, _), one, other in zip(named, ours, theirs, strict=True):
        difference = float((one - other).abs().max())
        assert difference <= GRADIENT * size, f"{what} gradient of {name}: {difference:.3g}, the largest is {size:.3g}"


def check_fused(block, same, size=11):
    """Fused against unfused in eval mode; returns the fused module."""
    block.eval()
    x = images(block.in_channels, size)
    fused = block.fuse()
    same(fused(x), block(x), FUSED, "fused output")
    return fused


def check_half(block):
    """Half-precision blocks: right dtype, and deployed values rounded once from the exact fold of their parameters."""
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(block).to(dtype).eval()
        exact = copy.deepcopy(half).double().equivalent_kernel_bias()
        fused = half.fuse()
        conv = fused if isinstance(fused, nn.Conv2d) else fused.conv
        assert conv.weight.requires_grad
        for got, wanted in zip((conv.weight, conv.bias), exact, strict=True):
            assert got.dtype is dtype
            bound = 0.5 * torch.finfo(dtype).eps * wanted.abs() + 1e-6 * wanted.abs().max()
            assert_close(got, wanted, bound.detach(), f"{dtype} fused")
        x = images(block.in_channels, 9, dtype)
        assert fused(x).dtype is dtype
        assert half(x).dtype is dtype


def check_life(block, same):
    """Copies, pickles and channels_last compute the same; conversion keeps requires_grad, and twice changes nothing."""
    block.eval()
    x = images(block.in_channels)
    expected = block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), expected)
    last = copy.deepcopy(block).to(memory_format=torch.channels_last)
    output = last(x.contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    same(output, expected, FUSED, "channels_last")
    plain = reparameterize(nn.Sequential(block)).eval()
    again = reparameterize(plain)
    assert [type(m) for m in again.modules()] == [type(m) for m in plain.modules()]
    same(again(x), expected, FUSED, "reparameterized twice")
    assert all(p.requires_grad for p in plain.parameters())
    frozen = reparameterize(nn.Sequential(copy.deepcopy(block).requires_grad_(False)))
    assert not any(p.requires_grad for p in frozen.parameters())


def check_every_parameter_is_used(block):
    """DistributedDataParallel waits for the gradient of every parameter that wants one."""
    block.train()
    block(images(block.in_channels)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def check_replaced(kind, randomize, same):
    """In a pretrained net, with the function preserved: beside the norms that follow, and with them as its own."""
    for groups, bias in ((1, True), (2, False)):
        net = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=bias),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, 2, 2, 2, groups, bias, padding_mode="reflect"),
            nn.BatchNorm2d(6),
        )
        net = randomize(net.double()).eval()
        x = images(4)
        expected = net(x)
        for fold_norm in (False, True):
            new = replace_convs(copy.deepcopy(net), kind, preserve=True, fold_norm=fold_norm)
            assert isinstance(new[0], RepBlock)
            assert isinstance(new[1], nn.Identity if fold_norm else nn.BatchNorm2d)
            same(new(x), expected, GRADIENT, f"preserved, fold_norm={fold_norm}")
            trained = randomize(new)
            same(reparameterize(trained)(x), trained(x), GRADIENT, "and reparameterized")


def check_compiles(block, same):
    """One graph, in training with its backward."""
    block.train()
    x = images(block.in_channels)
    expected = copy.deepcopy(block)
    output, wanted = torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected(x)
    same(output, wanted, FUSED, "compiled output")
    output.square().sum().backward()
    wanted.square().sum().backward()
    for (name, one), other in zip(block.named_parameters(), expected.parameters(), strict=True):
        if one.requires_grad:
            bound = GRADIENT * float(wanted.detach().abs().max()) * 1e3
            assert_close(one.grad, other.grad, bound, f"compiled gradient of {name}")


def check_step(block, literal, same, what=""):
    """Output, gradients and statistics after one step of `block` against `literal(copy, x)`, which calls its norms."""
    block.zero_grad()
    twin = copy.deepcopy(block)
    x, y = (images(block.in_channels).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    got, wanted = block(x), literal(twin, y)
    same(got, wanted, FUSED, f"{what} output")
    toward = torch.randn_like(got)
    (got * toward).sum().backward()
    (wanted * toward).sum().backward()
    theirs = {"input": y, **dict(twin.named_parameters())}
    size = max(float(tensor.grad.abs().max()) for tensor in theirs.values())
    for name, tensor in {"input": x, **dict(block.named_parameters())}.items():
        difference = float((tensor.grad - theirs[name].grad).abs().max())
        assert difference <= GRADIENT * size, f"{what} gradient of {name}: {difference:.3g}, the largest is {size:.3g}"
    for (name, one), other in zip(block.named_buffers(), twin.buffers(), strict=True):
        assert_close(one.double(), other.double(), FUSED * float(1 + other.abs().max()), f"{what} {name}")


def normed_and_padded(block, y, norm):
    """pad(norm(y)) whose border is what the norm makes of zero; block.border says by which statistics."""
    z = norm(y)
    height, width = block._pad
    if block.padding_mode != "zeros":
        return padded(block, z)
    if block.border == "released":
        mean, var = norm.running_mean, norm.running_var
    elif norm.training:
        var, mean = torch.var_mean(y, (0, 2, 3), unbiased=False)
    else:
        mean, var = norm.running_mean, norm.running_var
    of_zero = norm.bias - mean * norm.weight / torch.sqrt(var + norm.eps)
    if block.border == "released":
        of_zero = of_zero.detach()
    of_zero = of_zero[:, None, None]
    return functional.pad(z - of_zero, (width, width, height, height)) + of_zero


def pooled(block, z):
    """Average pooling of a padded map at the block's stride and dilation."""
    k = block.kernel_size[0]
    if block.dilation == (1, 1):
        return functional.avg_pool2d(z, k, block.stride)
    windows = functional.unfold(z, k, block.dilation, 0, block.stride).unflatten(1, (z.shape[1], k * k)).mean(2)
    size = (z.shape[at + 2] - block.dilation[at] * (k - 1) - 1 for at in (0, 1))
    return windows.unflatten(2, [extent // stride + 1 for extent, stride in zip(size, block.stride, strict=True)])


def one_by_one(block, x, weight):
    """The 1x1 convolution, weight [Cm, Ci/g, 1, 1], of the whole map."""
    return functional.conv2d(x, weight, None, groups=block.groups)


def expanded(block, z, weight):
    """The KxK convolution of a padded map."""
    return functional.conv2d(z, weight, None, block.stride, 0, block.dilation, block.groups)
