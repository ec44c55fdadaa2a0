"""The released OREPA layouts (paper 2204.00826): tensors and names -> ours, differentiably.

Where the released code differs from the paper, the difference is put into the tensors: its average filter is 1/K^2
rounded to float32, its prior filters are too (and start elsewhere for odd Co), its grouped dw-pw branch reads rows in
another order, and its deep stem composes kernels by cross-correlation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from repkern.models.checkpoints.layout import CONV_BN_DEPLOYED, Block, BlockRule, Layout, deployed, inside, prefixed
from repkern.nn.fold import dct_kernel

__all__ = ["OREPA"]

_logger = logging.getLogger("repkern")
_EXPANSION = 8
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def _flip(kernel: Tensor) -> Tensor:
    return kernel.flip(-2, -1)


def _matrix(kernel: Tensor) -> Tensor:
    """[Co, Ci/g, 1, 1] -> [Co, Ci/g]."""
    return kernel.flatten(1)


def _average(avg: Tensor, window: Tensor) -> Tensor:
    """The 1x1 before average pooling, with the rounding of the released window in it."""
    if not bool((window == window.flatten()[0]).all()):
        raise ValueError(f"an average filter must be constant, got {window.tolist()}")
    return _matrix(avg) * (window.flatten()[0] * window.numel())


def _prior(prior: Tensor, filters: Tensor, flipped: bool) -> Block:
    """The 1x1 of the prior branch, and its filters where they are not the paper's."""
    prior = _matrix(prior)
    co, k = filters.shape[0], filters.shape[-1]
    if flipped:
        filters = _flip(filters)
    ours = dct_kernel(co, k, dtype=filters.dtype, device=filters.device)
    # A flipped cosine of whole frequency is the same one up to its sign, which the 1x1 can take.
    sign = torch.where((filters * ours).sum(dim=(1, 2)) < 0, -1.0, 1.0).to(filters.dtype)
    if bool(((filters * sign[:, None, None] - ours).abs() <= torch.finfo(filters.dtype).eps).all()):
        return {"prior": prior * sign[:, None]}
    return {"prior": prior, "prior_filter": filters.contiguous()}


def _deviation(conv: Tensor, identity: Tensor | None) -> Tensor:
    """What `reduce` must be for reduce + I to be the released 1x1 kernel."""
    conv = _matrix(conv)
    rows, columns = conv.shape
    ours = torch.zeros_like(conv)
    at = torch.arange(rows)
    ours[at, at % columns] = 1
    return conv - ours if identity is None else conv + (_matrix(identity) - ours)


def _project(pointwise: Tensor, depthwise: Tensor, channels_per_group: int) -> Tensor:
    """Rows in natural order: the released code reads row j * g + c for output j of group c."""
    pointwise = _matrix(pointwise)
    groups = depthwise.shape[0] // _EXPANSION // channels_per_group
    return pointwise.unflatten(0, (-1, groups)).transpose(0, 1).flatten(0, 1)


def _kernel(block: Block, name: str, *, flipped: bool = False) -> Block:
    """The tensors of one OREPA kernel; `name` is "orepa" or "rbr", the two spellings of the released code."""

    def take(key: str) -> Tensor:
        return block[f"weight_{name}_{key}"]

    def spatial(kernel: Tensor) -> Tensor:
        return _flip(kernel) if flipped else kernel

    random_reduce = f"weight_{name}_1x1_kxk_conv1" in block
    reduce = take("1x1_kxk_conv1") if random_reduce else take("1x1_kxk_idconv1")
    identity = None if random_reduce else block["id_tensor"]
    ours = {
        "origin": spatial(take("origin")),
        "avg": _average(take("avg_conv"), take("avg_avg")),
        "reduce": _deviation(reduce, identity),
        "expand": spatial(take("1x1_kxk_conv2")),
        "depthwise": spatial(take("gconv_dw").squeeze(1)),
        "project": _project(take("gconv_pw"), take("gconv_dw"), take("origin").shape[1]),
        "scale": block["vector"],
    }
    ours |= _prior(take("pfir_conv"), take("prior"), flipped)
    if f"weight_{name}_1x1" in block:
        ours["pointwise"] = _matrix(take("1x1"))
    elif block["vector"].shape[0] == 6:
        _logger.warning("OREPA-VGG: the sixth row of `vector`, which the released code never uses, is left out")
        ours["scale"] = block["vector"][:5]
    return _held(ours)


def _held(ours: Block) -> Block:
    """By the names of the modules that hold the parameters; the scales row by row."""
    ours["scale"] = ours["scale"].flatten()
    return {name if name == "prior_filter" else f"{name}.weight": tensor for name, tensor in ours.items()}


def _orepa(block: Block) -> Block:
    return prefixed("conv.", _kernel(block, "orepa")) | prefixed("bn.", inside("bn.", block))


def _orepa_1x1(block: Block) -> Block:
    first, second = block["weight_or1x1_l2i_conv1"], block["weight_or1x1_l2i_conv2"]
    out_channels, in_channels = block["weight_or1x1_origin"].shape[:2]
    # OREPAConv2d keeps `reduce` as a deviation from the identity exactly where the released code starts it there.
    reduce = _deviation(first, None) if out_channels > in_channels else _matrix(first)
    conv = {
        "origin": block["weight_or1x1_origin"],
        "reduce": reduce,
        "expand": second,
        "scale": block["vector"],
    }
    return prefixed("conv.", _held(conv)) | prefixed("bn.", inside("bn.", block))


def _deep_stem(block: Block) -> Block:
    ours: Block = prefixed("bn.", inside("bn.", block))
    at = 0
    while f"weight{at}" in block or f"weight{at}.vector" in block:
        plain, flipped = block.get(f"weight{at}"), at > 0
        if plain is not None:
            factor = {"weight": _flip(plain) if flipped else plain}
        else:
            factor = _kernel(inside(f"weight{at}.", block), "orepa", flipped=flipped)
        ours |= prefixed(f"factors.{at}.", factor)
        at += 1
    return ours


def _repvgg(block: Block) -> Block:
    dense = inside("rbr_dense.", block)
    ours = prefixed("dense.", _kernel(dense, "rbr"))
    ours |= prefixed("dense_bn.", inside("bn.", dense))
    ours |= {"pointwise.weight": block["rbr_1x1.conv.weight"]}
    ours |= prefixed("pointwise_bn.", inside("rbr_1x1.bn.", block))
    ours |= prefixed("identity_bn.", inside("rbr_identity.", block))
    return ours


_OREPA_KEYS = (
    r"(weight_orepa_(origin|avg_conv|pfir_conv|1x1|1x1_kxk_idconv1|1x1_kxk_conv2|gconv_dw|gconv_pw|avg_avg|prior)"
    r"|vector|id_tensor)"
)
_RBR_KEYS = (
    r"(weight_rbr_(origin|avg_conv|pfir_conv|1x1_kxk_(idconv1|conv1|conv2)|gconv_dw|gconv_pw|avg_avg|prior)"
    r"|vector|id_tensor)"
)


def _rule(mark: str, keys: str, convert: Callable[[Block], Block]) -> BlockRule:
    return BlockRule(mark, rf"{keys}|bn\.{_NORM}", convert)


_STEM = _rule(r"weight0(?:\.vector)?", rf"weight\d+(\.{_OREPA_KEYS})?", _deep_stem)


OREPA = Layout(
    "orepa",
    "JUGGHM/OREPA_CVPR2022",
    (
        replace(_STEM, needs=(r"weight1(?:\.vector)?",), before_inner=True),
        _rule("weight_orepa_origin", _OREPA_KEYS, _orepa),
        _rule("weight_or1x1_origin", "weight_or1x1_(origin|l2i_conv1|l2i_conv2)|vector", _orepa_1x1),
        _rule(
            r"rbr_dense\.weight_rbr_origin",
            rf"rbr_dense\.({_RBR_KEYS}|bn\.{_NORM})|rbr_1x1\.(conv\.weight|bn\.{_NORM})|rbr_identity\.{_NORM}",
            _repvgg,
        ),
        deployed("orepa_reparam", activated=False),
        deployed("or1x1_reparam", activated=False),
        deployed("or_large_reparam", activated=False),
        deployed("rbr_reparam", activated=True),
        CONV_BN_DEPLOYED,
    ),
)
