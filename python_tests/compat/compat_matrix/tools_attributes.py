"""Code that reads and writes a convolution's attributes."""

import copy
import inspect

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import fusion, prune

from compat_matrix.cases import KINDS
from compat_matrix.table import tool
from compat_matrix.tools_parameters import KERNEL_CONVS
from compat_matrix.values import close, folds, plain_of, step, trains

ATTRIBUTES = "Attributes of `nn.Conv2d`"


def run_plainly(conv, x, weight):
    """The convolution of `conv` with another weight, as a parent computes it that knows only torch."""
    if conv.padding_mode != "zeros":
        x = functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        return functional.conv2d(x, weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
    return functional.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def behaves_as_plain(case, run):
    """`run(conv, x)` gives for the block what it gives for its deployed convolution, with gradients to all."""
    block, x = case.make(), case.images()
    out = run(block, x)
    close(out, run(plain_of(block), x), "against nn.Conv2d")
    out.square().sum().backward()
    for name, parameter in block.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.any()), name
    folds(block, x)


@tool("reading `weight`", ATTRIBUTES, only=KERNEL_CONVS)
def read_weight(case):
    """The kernel that the next forward uses, with a gradient to every parameter behind it."""
    block, x = case.make(), case.images()
    close(block.weight, plain_of(block).weight, "weight")
    close(run_plainly(block, x, block.weight), block(x), "computed with weight")
    step(block, x)
    close(block.weight, plain_of(block).weight, "weight after a step")
    behaves_as_plain(case, lambda conv, x: run_plainly(conv, x, conv.weight))


@tool("other attributes and methods", ATTRIBUTES, only=KERNEL_CONVS)
def read_attributes(case):
    """All of `nn.Conv2d`'s: `transposed`, `output_padding`, `bias`, geometry, `_conv_forward`; `isinstance`."""
    block = case.make()
    plain = plain_of(block)
    assert isinstance(block, nn.Conv2d)
    names = {name for name in vars(plain) if not name.startswith("_")} | {"weight", "bias"}
    for name in sorted(names - {"training"}):
        mine, theirs = getattr(block, name), getattr(plain, name)
        assert torch.equal(mine, theirs) if isinstance(theirs, torch.Tensor) else mine == theirs, name
    assert block.weight.shape == plain.weight.shape
    assert block.weight.dtype is plain.weight.dtype
    assert block.weight.requires_grad
    assert list(inspect.signature(block._conv_forward).parameters) == list(
        inspect.signature(plain._conv_forward).parameters
    )
    behaves_as_plain(case, lambda conv, x: conv._conv_forward(x, conv.weight, conv.bias))


@tool("writing `weight`", ATTRIBUTES, only=KERNEL_CONVS)
def write_weight(case):
    """Assignment of a parameter, `.data =`, `.data.copy_`, `copy_` and `mul_` without gradients, a view: the kernel is
    what was written; training goes on."""
    wanted = torch.randn_like(case.make().weight.detach())
    ways = {
        "assigned": lambda conv: setattr(conv, "weight", nn.Parameter(wanted.clone())),
        "data": lambda conv: setattr(conv.weight, "data", wanted.clone()),
        "data.copy_": lambda conv: conv.weight.data.copy_(wanted),
        "detach": lambda conv: conv.weight.detach().copy_(wanted),
        "copy_": lambda conv: conv.weight.copy_(wanted),
        "view": lambda conv: conv.weight.view(-1).copy_(wanted.view(-1)),
        "item": lambda conv: conv.weight.__setitem__(slice(None), wanted),
    }
    for name, write in ways.items():
        block, x = case.make(), case.images()
        with torch.no_grad():
            write(block)
        close(block.weight.detach(), wanted, name)
        close(plain_of(block).weight.detach(), wanted, f"{name}, deployed")
        folds(block, x)
        trains(block, x)


@tool("LoRA", ATTRIBUTES, only=KERNEL_CONVS)
def lora(case):
    """A wrapper that computes `F.conv2d(x, m.weight + B @ A)`; as around the deployed convolution."""

    def run(conv, x):
        torch.manual_seed(5)
        weight = conv.weight
        up = torch.randn(weight.shape[0], 2, dtype=x.dtype)
        down = torch.randn(2, weight[0].numel(), dtype=x.dtype)
        return run_plainly(conv, x, weight + (up @ down).view_as(weight))

    behaves_as_plain(case, run)


@tool("LoRA merged", ATTRIBUTES, only=KERNEL_CONVS)
def lora_merged(case):
    """`m.weight.data += B @ A`, as adapters are merged; the kernel is the sum."""
    block, x = case.make(), case.images()
    before = block.weight.detach().clone()
    delta = torch.randn_like(before)
    block.weight.data += delta
    close(block.weight.detach(), before + delta, "merged")
    folds(block, x)
    trains(block, x)


@tool("weight standardization", ATTRIBUTES, only=KERNEL_CONVS)
def standardized(case):
    """A parent that computes with `(w - mean) / std` of `m.weight`; as with the deployed convolution."""

    def run(conv, x):
        weight = conv.weight
        dims = (1, 2, 3)
        mean, std = weight.mean(dims, keepdim=True), weight.std(dims, keepdim=True, unbiased=False) + 0.1
        return run_plainly(conv, x, (weight - mean) / std)

    block, x = case.make(), case.images()
    close(run(block, x), run(plain_of(block), x), "against nn.Conv2d")
    run(block, x).square().sum().backward()
    assert all(p.grad is not None for p in block.parameters() if p.requires_grad)
    folds(block, x)


@tool("`fuse_conv_bn_eval`", ATTRIBUTES, only=KERNEL_CONVS)
def fused_by_torch(case):
    """torch's own fuser of a convolution and a norm, which writes `weight` and `bias` of a copy: the copy computes
    both, and so does its deployed form; the block stays."""
    block, x = case.make(), case.images()
    norm = nn.BatchNorm2d(block.out_channels).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    before = block(x)
    wanted = norm(before)
    fused = fusion.fuse_conv_bn_eval(block, norm)
    close(fused(x), wanted, "fused by torch")
    close(plain_of(fused)(x), wanted, "fused by torch, deployed")
    close(block(x), before, "the block itself")


@tool("pruning a block's own `weight`", ATTRIBUTES, only=KERNEL_CONVS, refused=dict.fromkeys(KERNEL_CONVS, ValueError))
def pruned_itself(case):
    """`prune.l1_unstructured(block, "weight")`: the computed weight is no parameter, so pruning it is refused."""
    block = case.make()
    prune.l1_unstructured(block, "weight", 0.5)


@tool("forward pre-hooks and hooks", ATTRIBUTES, only=KINDS)
def hooked(case):
    """A pre-hook that scales the input and a hook that reads the output are called, once, in both forms' stead."""
    block, x = case.make(), case.images()
    wanted = block(2 * x)
    calls = []
    block.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    block.register_forward_hook(lambda *_: calls.append(1))
    close(block(x), wanted, "scaled input")
    assert len(calls) == 1
    copied = copy.deepcopy(block)
    assert len(copied._forward_pre_hooks) == 1
