"""RepGhostNet (paper 2211.06088) at 0.5x, the light network of the RepOptimizer paper."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from repkern.models.network import Feature, Network, Options, Step, plan_strides
from repkern.nn.repghost import RepGhostModule
from repkern.nn.squeeze_excite import SqueezeExcite

__all__ = ["DEFAULT_BLOCK", "MODELS", "RepGhostNet"]

DEFAULT_BLOCK = "repghost"

MODELS = {"repghostnet_050": 0.5}

_DIVISOR = 4
_SE_RATIO = 0.25
_HIDDEN = 1280
_DROPOUT = 0.2


class _Row(NamedTuple):
    """A unit at width 1: K of the strided and the shortcut layer, channels inside and behind it, squeeze-excite."""

    kernel_size: int
    inner: int
    channels: int
    se: bool
    stride: int


# Paper, Table 1. Groups of units as in the released network; every second one ends at a new reduction.
_ROWS = (
    (_Row(3, 8, 16, False, 1),),
    (_Row(3, 24, 24, False, 2),),
    (_Row(3, 36, 24, False, 1),),
    (_Row(5, 36, 40, True, 2),),
    (_Row(5, 60, 40, True, 1),),
    (_Row(3, 120, 80, False, 2),),
    (
        _Row(3, 100, 80, False, 1),
        _Row(3, 120, 80, False, 1),
        _Row(3, 120, 80, False, 1),
        _Row(3, 240, 112, True, 1),
        _Row(3, 336, 112, True, 1),
    ),
    (_Row(5, 336, 160, True, 2),),
    (
        _Row(5, 480, 160, False, 1),
        _Row(5, 480, 160, True, 1),
        _Row(5, 480, 160, False, 1),
        _Row(5, 480, 160, True, 1),
    ),
)
_STEM = 16
_FINAL = 960


def _divisible(channels: float) -> int:
    """The nearest multiple of 4, raised where rounding would take more than a tenth away."""
    rounded = max(_DIVISOR, int(channels + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
    return rounded + _DIVISOR if rounded < 0.9 * channels else rounded


class _Unit(nn.Module):
    """ghost2(se(depthwise(ghost1(x)))) + shortcut(x); ghost1 has the ReLUs."""

    ghost1: nn.Module
    depthwise: nn.Module | None
    se: nn.Module | None
    ghost2: nn.Module
    shortcut: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """[N, Ci, H, W] -> [N, Co, H', W']."""
        y = self.ghost1(x)
        y = y if self.depthwise is None else self.depthwise(y)
        y = y if self.se is None else self.se(y)
        return self.ghost2(y) + self.shortcut(x)


class RepGhostNet(Network):
    """`stem` (3x3, stride 2), `stages.N.i.{ghost1,depthwise,se,ghost2,shortcut}`, `final` (1x1), `hidden`, `head`.

    block="repghost" is the published one: RepGhostModules, everything else conv + BN; its block options are
    norm_identity and raw_identity. Another kind takes the place of every convolution, the 1x1 and the depthwise half of
    the modules included; "conv_bn" is the target of RepOpt-GhostNet.
    Feature maps: stages 0, 2, 4, 6, 8 at reductions 2, 4, 8, 16, 32. Convolutions start as torch starts them, as in the
    released training. Dropout of 0.2 before `head`.
    """

    own_kinds = {DEFAULT_BLOCK: ("norm_identity", "raw_identity")}  # noqa: RUF012  typed in the base class

    def __init__(self, variant: float, options: Options) -> None:
        super().__init__(options)
        width = variant * options.width
        first, *steps = plan_strides((2, *(group[0].stride for group in _ROWS)), options.output_stride)
        before = _divisible(_STEM * width)
        self.stem = self._make(options.in_chans, before, 3, first.stride)
        self.stages, features = nn.ModuleList(), []
        for number, (group, step) in enumerate(zip(_ROWS, steps, strict=True)):
            units = []
            for at, row in enumerate(group):
                inner, channels = _divisible(row.inner * width), _divisible(row.channels * width)
                units.append(self._unit(row, before, inner, channels, step if at == 0 else step.rest))
                before = channels
            self.stages.append(nn.Sequential(*units))
            if number % 2 == 0:
                features.append(Feature(before, step.reduction, f"stages.{number}"))
        final = _divisible(_FINAL * width)
        self.final = self._make(before, final, 1)
        if not options.features_only:
            self.hidden = nn.Conv2d(final, _HIDDEN, 1)
        stages = [f"stages.{number}" for number in range(len(_ROWS))]
        self._finish(["stem", *stages, "final"], features, _HIDDEN)

    def _unit(self, row: _Row, in_channels: int, inner: int, out_channels: int, step: Step) -> _Unit:
        unit = _Unit()
        strided: dict[str, Any] = {"stride": step.stride, "dilation": step.first_dilation, "relu": False}
        unit.ghost1 = self._ghost(in_channels, inner, step.first_dilation, relu=True)
        unit.depthwise = unit.se = None
        if not step.keeps_positions:
            unit.depthwise = self._make(inner, inner, row.kernel_size, groups=inner, identity=False, **strided)
        if row.se:
            unit.se = SqueezeExcite(inner, _divisible(inner * _SE_RATIO), gate="hardsigmoid")
        unit.ghost2 = self._ghost(inner, out_channels, step.dilation, relu=False)
        unit.shortcut = nn.Identity()
        if in_channels != out_channels or not step.keeps_positions:
            size = row.kernel_size
            depthwise = self._make(
                in_channels, in_channels, size, groups=in_channels, identity=step.keeps_positions, **strided
            )
            pointwise = self._make(in_channels, out_channels, 1, relu=False)
            unit.shortcut = nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))
        return unit

    def _ghost(self, in_channels: int, out_channels: int, dilation: int, *, relu: bool) -> nn.Module:
        if self.block != DEFAULT_BLOCK:
            primary = self._make(in_channels, out_channels, 1, relu=relu)
            fusion = self._make(out_channels, out_channels, 3, dilation=dilation, groups=out_channels, relu=relu)
            return nn.Sequential(OrderedDict(primary=primary, fusion=fusion))
        return RepGhostModule(
            in_channels,
            out_channels,
            activation=nn.ReLU() if relu else None,
            depthwise_dilation=dilation,
            recompute=self.options.recompute,
            **self.options.block_options,
        )

    def _pooled(self, x: Tensor) -> Tensor:
        x = functional.relu(self.hidden(functional.adaptive_avg_pool2d(x, 1)).flatten(1))
        return functional.dropout(x, _DROPOUT, self.training)
