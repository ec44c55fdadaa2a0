"""Scales that a hyper-search of RepOptimizers found: read by name, and compared with the network they are for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from repkern.models.checkpoints.layout import Conversion
from repkern.models.checkpoints.match import LoadReport, complain
from repkern.nn.conv_norm_act import ConvNormAct
from repkern.nn.csla import CSLABlock

__all__ = ["SCALE_NAMES", "checked_scales", "named_as_in"]

SCALE_NAMES = ("dense_scale", "pointwise_scale", "identity_scale")


def checked_scales(
    converted: Conversion, model: nn.Module | None, report: LoadReport, *, strict: bool
) -> dict[str, Tensor]:
    """The scales [Co] by the name of their layer, such as "stages.0.1.dense_scale"; anything else is left out.

    model: the target network (convolution and norm), or one of CSLA blocks; every scale must have its layer, of that
    many channels, and every layer of the kind that has scales must have them. It is not changed.
    ValueError that lists what does not match; with strict=False a logged warning, and the scales that do.
    """
    # In a state_dict of ours a scale is the `weight` of the module that bears its name.
    names = {name: name.removesuffix(".weight") for name in converted.tensors}
    scales = {names[n]: t for n, t in converted.tensors.items() if names[n].rpartition(".")[2] in SCALE_NAMES}
    report.left_out += [name for name, own in names.items() if own not in scales]
    if model is None:
        return scales
    scales = named_as_in(model, scales)
    wanted = dict(_wanted(model, scales))
    report.missing = [name for name in wanted if name not in scales]
    report.unexpected = [name for name in scales if name not in wanted]
    report.mismatched = {
        name: (tuple(scales[name].shape), (channels,))
        for name, channels in wanted.items()
        if name in scales and tuple(scales[name].shape) != (channels,)
    }
    report.loaded = [name for name in scales if name in wanted and name not in report.mismatched]
    complain(report.problems, model, len(report.problems), strict=strict)
    return {name: scales[name] for name in report.loaded}


def named_as_in(model: nn.Module, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scales by the names of their layers in `model`.

    A convolution that a squeeze-excite follows is `conv` in an nn.Sequential, and the layer itself without one: scales
    of either network are for both.
    """
    renamed: dict[str, Tensor] = {}
    for name, scale in scales.items():
        layer, _, part = name.rpartition(".")
        outer, _, last = layer.rpartition(".")
        if isinstance(_module(model, layer), nn.Sequential) and _is_layer(_module(model, f"{layer}.conv")):
            layer = f"{layer}.conv"
        elif last == "conv" and _is_layer(_module(model, outer)):
            layer = outer
        renamed[f"{layer}.{part}" if layer else part] = scale
    return renamed


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _is_layer(module: nn.Module | None) -> bool:
    return isinstance(module, (ConvNormAct, CSLABlock))


def _wanted(model: nn.Module, scales: dict[str, Tensor]) -> Iterator[tuple[str, int]]:
    """(name, channels) of every scale that the model's layers should have."""
    given = {name.rpartition(".")[0] for name in scales}
    # RepOpt-GhostNet has scales only in its ghost modules, which have no 1x1 branch beside the depthwise convolution.
    kinds = {_kind(name, module) for name, module in model.named_modules() if name in given}
    parts = [part for part in SCALE_NAMES if any(name.rpartition(".")[2] == part for name in scales)]
    for name, module in model.named_modules():
        if not isinstance(module, (ConvNormAct, CSLABlock)) or not (name in given or _kind(name, module) in kinds):
            continue
        for part in parts:
            if part != "identity_scale" or module._keeps_positions:
                yield (f"{name}.{part}" if name else part), module.out_channels


def _kind(name: str, module: nn.Module) -> tuple[str, int] | None:
    """What layers must share for all of them to have scales, where any has."""
    if not isinstance(module, (ConvNormAct, CSLABlock)):
        return None
    depthwise = module.groups == module.in_channels > 1
    return (name.rpartition(".")[2] if depthwise else ""), module.kernel_size[0]
