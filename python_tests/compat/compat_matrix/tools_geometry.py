"""Geometry that is written after construction."""

import copy

import pytest
from torch import nn

from compat_matrix.cases import KINDS
from compat_matrix.table import tool
from compat_matrix.tools_parameters import KERNEL_CONVS
from compat_matrix.values import close, folds, plain_of, trains
from repkern.nn import RepBlock, RepGhostModule

GEOMETRY = "Geometry written later"
WHERE = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
BLOCKS = [kind for kind in KINDS if kind is not RepGhostModule]


def dilate(model, rate):
    """What segmentation_models_pytorch and others do to the last stages of an encoder."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            module.stride = (1, 1)
            module.dilation = (rate, rate)
            module.padding = ((height // 2) * rate, (width // 2) * rate)
            if module.padding_mode != "zeros":  # nn.Conv2d pads by a list it made in its constructor
                own = [module.padding[1]] * 2 + [module.padding[0]] * 2
                if "_reversed_padding_repeated_twice" in vars(module):
                    module._reversed_padding_repeated_twice = own
    return model


def conv_of(plain):
    return next(module for module in plain.modules() if isinstance(module, nn.Conv2d))


def follows(case, write):
    """Writing to the block and to the plain convolution in its place have the same effect. Or: ValueError, twice."""
    block = case.make()
    plain = plain_of(block)
    adds_input = type(block).__name__ != "RepGhostModule" and getattr(block, "_adds_input", False)
    write(plain)
    x = case.images()
    out, refusal = attempted(lambda: (write(block), folds(block, x))[1])
    if refusal is None:
        close(out, plain(x), "the written geometry")
        trains(block, x)
        return
    assert adds_input, f"refused although the block could follow: {refusal}"
    for refused in (lambda: block(x), lambda: plain_of(block)):
        with pytest.raises(ValueError, match=r"adds its input|stride"):
            refused()


def attempted(run):
    """(result, None), or (None, the ValueError)."""
    try:
        return run(), None
    except ValueError as problem:
        return None, problem


def main_conv(model):
    """The block itself, or the deployed convolution."""
    return model if isinstance(model, RepBlock) else conv_of(model)


@tool("nothing written", GEOMETRY)
def as_constructed(case):
    """After training the block and its deployed convolution have the geometry that the constructor was given."""
    block, x = case.make(), case.images()
    trains(block, x)
    conv = conv_of(plain_of(block))
    ci, co, groups, size, *rest, mode = case.geometry
    like = nn.Conv2d(ci, co, size, rest[0], rest[1] or 0, rest[2], groups, padding_mode=mode)
    if rest[1] is None:
        like.padding = tuple(d * (size // 2) for d in like.dilation)
    for name in WHERE:
        assert getattr(conv, name) == getattr(like, name), name
        assert isinstance(block, RepGhostModule) or getattr(block, name) == getattr(like, name), name
    folds(block, x)


@tool("encoders made dilated at the end", GEOMETRY)
def made_dilated(case):
    """segmentation_models_pytorch's `replace_strides_with_dilation`: stride 1, dilation d and padding d * (K // 2) in
    every `nn.Conv2d` inside; as the same done to the deployed convolution."""
    for rate in (2, 4):
        follows(case, lambda model, rate=rate: dilate(model, rate))


@tool("dilation and padding of a block", GEOMETRY, only=BLOCKS)
def attribute_dilation(case):
    """`block.dilation`, then `block.padding`; as the same written to the deployed convolution."""

    def write(model):
        conv = main_conv(model)
        conv.dilation = (3, 3)
        conv.padding = tuple(3 * (k // 2) for k in conv.kernel_size)
        if conv.padding_mode != "zeros" and not isinstance(model, RepBlock):
            conv._reversed_padding_repeated_twice = [conv.padding[1]] * 2 + [conv.padding[0]] * 2

    follows(case, write)


@tool("stride of a block", GEOMETRY, only=BLOCKS)
def attribute_stride(case):
    """`block.stride = (3, 2)`; as the same written to the deployed convolution, or ValueError from a block
    that adds its input."""
    follows(case, lambda model: setattr(main_conv(model), "stride", (3, 2)))


@tool("padding mode of a block", GEOMETRY, only=BLOCKS)
def attribute_mode(case):
    """`block.padding_mode`; as the same written to the deployed convolution."""

    def write(model):
        conv = main_conv(model)
        conv.padding_mode = "zeros" if conv.padding_mode != "zeros" else "circular"

    follows(case, write)


@tool("channels and kernel size of a block", GEOMETRY, only=BLOCKS)
def attribute_fixed(case):
    """`in_channels`, `out_channels`, `groups`, `kernel_size` cannot be rewritten: ValueError, and nothing changes."""
    block, x = case.make(), case.images()
    before = block(x)
    for name, value in (("in_channels", 16), ("out_channels", 32), ("groups", 16), ("kernel_size", (9, 9))):
        with pytest.raises(ValueError, match=f"{name} of a .* cannot become"):
            setattr(block, name, value)
    close(folds(block, x), before, "after refused writes")


@tool("one convolution of a block", GEOMETRY, only=[k for k in BLOCKS if k not in KERNEL_CONVS or "CSLA" in k.__name__])
def half_changed(case):
    """Stride, dilation or padding of a single convolution inside: ValueError with the values of all, from forward and
    `fuse()`, or the block follows in both forms."""
    whole = case.make()
    inner = [name for name, m in whole.named_modules() if isinstance(m, nn.Conv2d) and name and ".down" not in name]
    inner = [name for name in inner if not name.startswith(("se.", "post_se."))]
    for name in inner:
        for field, value in (
            ("stride", (2, 3)),
            ("dilation", (3, 3)),
            ("padding", (5, 4)),
            ("padding_mode", "reflect"),
        ):
            block, x = copy.deepcopy(whole), nn.functional.pad(case.images(), [9] * 4)
            agree(block, name, field, value, x)


def agree(block, name, field, value, x):
    if attempted(lambda: setattr(block.get_submodule(name), field, value))[1] is not None:
        return
    outputs = []
    for run in (lambda: block(x), lambda: plain_of(block)(x)):
        out, refusal = attempted(run)
        assert refusal is None or field in str(refusal) or "adds its input" in str(refusal), refusal
        outputs.append(out)
    refused = [out is None for out in outputs]
    assert refused[0] == refused[1], f"{name}.{field}: forward refuses: {refused[0]}, deployed: {refused[1]}"
    if not refused[0]:
        close(*outputs, f"{name}.{field} = {value}")
