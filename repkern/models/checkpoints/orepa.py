"""The released OREPA layouts (paper 2204.00826): tensors and names -> ours, differentiably.

Where the released code differs from the paper, the difference is put into the tensors: its average filter is 1/K^2
rounded to float32, its prior filters are too (and start elsewhere for odd Co), its grouped dw-pw branch reads rows in
another order, and its deep stem composes kernels by cross-correlation.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import torch
from torch import Tensor

from repkern.nn.fold import dct_kernel

__all__ = ["convert_orepa", "is_orepa"]

_logger = logging.getLogger("repkern")
_Block = dict[str, Tensor]
_EXPANSION = 8
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_DEPLOYED = re.compile(r"(^|.*\.)(orepa_reparam|or1x1_reparam|or_large_reparam|rbr_reparam)\.(weight|bias)$")


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


def _prior(prior: Tensor, filters: Tensor, flipped: bool) -> _Block:
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


def _kernel(block: _Block, name: str, *, flipped: bool = False) -> _Block:
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
    return ours


def _prefixed(prefix: str, block: _Block) -> _Block:
    return {f"{prefix}{name}": tensor for name, tensor in block.items()}


def _inside(prefix: str, block: _Block) -> _Block:
    return {name.removeprefix(prefix): tensor for name, tensor in block.items() if name.startswith(prefix)}


def _orepa(block: _Block) -> _Block:
    return _prefixed("conv.", _kernel(block, "orepa")) | _prefixed("bn.", _inside("bn.", block))


def _orepa_1x1(block: _Block) -> _Block:
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
    return _prefixed("conv.", conv) | _prefixed("bn.", _inside("bn.", block))


def _deep_stem(block: _Block) -> _Block:
    ours: _Block = _prefixed("bn.", _inside("bn.", block))
    at = 0
    while f"weight{at}" in block or f"weight{at}.vector" in block:
        plain, flipped = block.get(f"weight{at}"), at > 0
        if plain is not None:
            factor = {"weight": _flip(plain) if flipped else plain}
        else:
            factor = _kernel(_inside(f"weight{at}.", block), "orepa", flipped=flipped)
        ours |= _prefixed(f"factors.{at}.", factor)
        at += 1
    return ours


def _repvgg(block: _Block) -> _Block:
    dense = _inside("rbr_dense.", block)
    ours = _prefixed("dense.", _kernel(dense, "rbr"))
    ours |= _prefixed("dense_bn.", _inside("bn.", dense))
    ours |= {"pointwise.weight": block["rbr_1x1.conv.weight"]}
    ours |= _prefixed("pointwise_bn.", _inside("rbr_1x1.bn.", block))
    ours |= _prefixed("identity_bn.", _inside("rbr_identity.", block))
    return ours


_OREPA_KEYS = (
    r"(weight_orepa_(origin|avg_conv|pfir_conv|1x1|1x1_kxk_idconv1|1x1_kxk_conv2|gconv_dw|gconv_pw|avg_avg|prior)"
    r"|vector|id_tensor)"
)
_RBR_KEYS = (
    r"(weight_rbr_(origin|avg_conv|pfir_conv|1x1_kxk_(idconv1|conv1|conv2)|gconv_dw|gconv_pw|avg_avg|prior)"
    r"|vector|id_tensor)"
)
# (the name that betrays a block, all names of such a block, its conversion); the first that fits a prefix wins.
_BLOCKS: tuple[tuple[re.Pattern[str], re.Pattern[str], Callable[[_Block], _Block]], ...] = tuple(
    (re.compile(rf"^(|.*\.){mark}$"), re.compile(rf"^{keys}$"), convert)
    for mark, keys, convert in (
        (r"weight0(?:\.vector)?", rf"(weight\d+(\.{_OREPA_KEYS})?|bn\.{_NORM})", _deep_stem),
        (r"weight_orepa_origin", rf"({_OREPA_KEYS}|bn\.{_NORM})", _orepa),
        (r"weight_or1x1_origin", rf"(weight_or1x1_(origin|l2i_conv1|l2i_conv2)|vector|bn\.{_NORM})", _orepa_1x1),
        (
            r"rbr_dense\.weight_rbr_origin",
            rf"(rbr_dense\.({_RBR_KEYS}|bn\.{_NORM})|rbr_1x1\.(conv\.weight|bn\.{_NORM})|rbr_identity\.{_NORM})",
            _repvgg,
        ),
    )
)


def is_orepa(tensors: dict[str, Tensor]) -> bool:
    """Whether any tensor belongs to a block of the released OREPA code."""
    marks = [mark for mark, _, _ in _BLOCKS[1:]]
    return any(_DEPLOYED.match(name) or any(mark.match(name) for mark in marks) for name in tensors) or any(
        _BLOCKS[0][0].match(name) and name.replace("weight0", "weight1", 1) in tensors for name in tensors
    )


def convert_orepa(tensors: dict[str, Tensor], model_names: set[str]) -> dict[str, Tensor]:
    """A state_dict of the released OREPA code in our names: OREPABlock, OREPADeepStem, OREPARepVGGBlock, plain ones.

    Names of other modules stay. model_names tells where a deployed block of the model has its convolution.
    ValueError, naming the block, when one of its tensors is absent.
    """
    left = dict(tensors)
    converted: dict[str, Tensor] = {}
    for mark, keys, convert in _BLOCKS:
        for prefix in [found.group(1) for found in map(mark.match, list(left)) if found]:
            names = [name for name in left if name.startswith(prefix) and keys.match(name.removeprefix(prefix))]
            block = {name.removeprefix(prefix): left.pop(name) for name in names}
            try:
                converted |= _prefixed(prefix, convert(block))
            except KeyError as absent:
                raise ValueError(f"block {prefix.rstrip('.') or '(root)'}: {absent} is absent") from None
    for name, tensor in left.items():
        deployed = _DEPLOYED.match(name)
        if deployed:
            prefix, _, kind = deployed.groups()
            inner = f"{prefix}conv.{kind}"
            name = inner if inner in model_names else f"{prefix}{kind}"
        converted[name] = tensor
    return converted
