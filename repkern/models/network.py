"""What every network of repkern.models shares: stages, feature taps, the head, gradient checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from repkern.models.hub import HubMixin
from repkern.nn.block import RepBlock
from repkern.nn.branch_sum import RECOMPUTE
from repkern.nn.conv_norm_act import ConvNormAct
from repkern.nn.kinds import check_kind, make_block

__all__ = ["OUTPUT_STRIDES", "Feature", "Network", "Options", "Step", "plan_strides", "scaled"]

OUTPUT_STRIDES = (8, 16, 32)


class Feature(NamedTuple):
    """A feature map a network can return: its channels, input pixels per feature pixel, and the module it leaves."""

    channels: int
    reduction: int
    module: str


@dataclass(frozen=True)
class Options:
    """The arguments of `create_model` that every family takes. ValueError or TypeError for what cannot be."""

    block: str = "conv_bn"
    num_classes: int = 1000
    in_chans: int = 3
    features_only: bool = False
    out_indices: Sequence[int] | None = None
    output_stride: int = 32
    width: float = 1.0
    recompute: str = "none"
    block_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least("num_classes", self.num_classes, 0)
        _at_least("in_chans", self.in_chans, 1)
        if self.output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride must be one of {OUTPUT_STRIDES}, got {self.output_stride!r}")
        if not self.width > 0:
            raise ValueError(f"width must be positive, got {self.width!r}")
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {self.recompute!r}")
        if self.out_indices is not None and not self.features_only:
            raise ValueError(f"out_indices (={list(self.out_indices)}) needs features_only=True")


def _at_least(name: str, value: int, lowest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}")


class Step(NamedTuple):
    """How the first layer of a stage is built, or with `rest` any other.

    stride: what is left of the published one. first_dilation: of a layer that has the stride. dilation: of the layers
    behind it. reduction: input pixels per pixel of the stage's output. published: the stride without output_stride.
    """

    stride: int
    first_dilation: int
    dilation: int
    reduction: int
    published: int

    @property
    def rest(self) -> Step:
        """The layers behind the first one."""
        return Step(1, self.dilation, self.dilation, self.reduction, 1)

    @property
    def keeps_positions(self) -> bool:
        """Whether the published layer may have an identity branch, so that output_stride changes no weight."""
        return self.published == 1


def plan_strides(strides: Sequence[int], output_stride: int, reduction: int = 1) -> list[Step]:
    """Strides beyond `output_stride` become dilation, so that each kept pixel sees what it saw before.

    A layer whose stride is dropped still reads the undilated map; the layers behind it read one pixel in `stride`.
    """
    steps, dilation = [], 1
    for published in strides:
        before, stride = dilation, published
        if reduction * stride > output_stride:
            dilation *= stride
            stride = 1
        reduction *= stride
        steps.append(Step(stride, before, dilation, reduction, published))
    return steps


def scaled(channels: float, width: float, divisor: int = 8) -> int:
    """Channels of a narrowed or widened network: unchanged at width 1, else a multiple of `divisor`."""
    return int(channels) if width == 1 else max(divisor, round(channels * width / divisor) * divisor)


class Network(HubMixin, nn.Module):
    """A convolutional network of `repkern.create_model`: images [N, in_chans, H, W] -> logits [N, num_classes].

    With num_classes=0 the pooled features [N, num_features]; with features_only=True a list of feature maps, those of
    `feature_info` in that order.
    Attributes: `model_name`; `block`, the kind of its blocks; `config`, the arguments that create it again;
    `num_features`, the features the last linear layer sees; `feature_info`, a tuple of `Feature`.
    """

    model_name: str
    config: dict[str, Any]
    num_features: int
    feature_info: tuple[Feature, ...]
    #: Kinds of blocks that only this family has, and the options they take; elsewhere they are conv + BN.
    own_kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(self, options: Options) -> None:
        super().__init__()
        check_kind(options.block, options.block_options, self.own_kinds)
        self.model_name = ""
        self.config = {}
        self.block = options.block
        self.options = options
        self._block_options = dict(options.block_options)
        self.grad_checkpointing = False
        self._steps: tuple[str, ...] = ()

    def _make(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        kind: str | None = None,
        relu: bool = True,
        **more: Any,
    ) -> nn.Module:
        """A block of this network's kind (or of `kind`, without the block options), with a ReLU unless told."""
        kind = "conv_bn" if self.block in self.own_kinds else kind
        own = self.block if kind is None or self.block == "plain" else kind
        options: dict[str, Any] = dict(self._block_options) if own == self.block else {}
        options["recompute"] = self.options.recompute
        activation = nn.ReLU() if relu else None
        return make_block(own, in_channels, out_channels, kernel_size, stride, activation=activation, **options, **more)

    def _finish(self, steps: Sequence[str], features: Sequence[Feature], num_features: int) -> None:
        """Fix the order of the submodules, the feature maps to return, and drop what features_only does not need.

        steps: names of the submodules that forward_features calls, in order.
        """
        picked = _checked_indices(self.options.out_indices, len(features))
        self.feature_info = tuple(features[index] for index in picked)
        self.num_features = num_features
        self._steps = tuple(steps)
        if not self.options.features_only:
            self.head = self._linear(num_features)
            return
        last = max(self._steps.index(feature.module) for feature in self.feature_info)
        for name in self._steps[last + 1 :]:
            parent, _, leaf = name.rpartition(".")
            del self.get_submodule(parent)._modules[leaf]
        self._steps = self._steps[: last + 1]

    def _linear(self, features: int) -> nn.Module:
        classes = self.options.num_classes
        return nn.Linear(features, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """[N, in_chans, H, W] -> [N, num_classes]; with features_only the list of `forward_taps`."""
        if self.options.features_only:
            return self.forward_taps(x)
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> the last feature map [N, C, H', W']."""
        self._check_input(x)
        for name in self._steps:
            x = self._step(name, x)
        return x

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        """[N, in_chans, H, W] -> the feature maps of `feature_info`."""
        self._check_input(x)
        wanted = {feature.module for feature in self.feature_info}
        maps: dict[str, Tensor] = {}
        for name in self._steps:
            x = self._step(name, x)
            if name in wanted:
                maps[name] = x
        return [maps[feature.module] for feature in self.feature_info]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[N, C, H', W'] -> logits [N, num_classes]; pre_logits: [N, num_features], before the last linear layer."""
        if self.options.features_only:
            raise ValueError(f"{self.model_name or type(self).__name__}: a features_only network has no head")
        x = self._pooled(x)
        return x if pre_logits else self.head(x)

    def _pooled(self, x: Tensor) -> Tensor:
        return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what enters a stage, and run the stage again in the backward. Running statistics move once."""
        self.grad_checkpointing = enable

    def _step(self, name: str, x: Tensor) -> Tensor:
        module = self.get_submodule(name)
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return module(x)

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), _statistics_stay(module)

        return checkpoint(module, x, use_reentrant=False, context_fn=contexts)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):  # a proxy of torch.fx
            return
        if x.dim() != 4 or x.shape[1] != self.options.in_chans:
            raise ValueError(
                f"{self.model_name or type(self).__name__}: the input must be [N, {self.options.in_chans}, H, W], "
                f"got {tuple(x.shape)}"
            )

    def _init_he(self) -> None:
        """He et al. 2015 (fan out) for convolutions that are not part of a multi-branch block; those have their own."""
        inside = {
            id(child)
            for block in self.modules()
            if isinstance(block, RepBlock) and not isinstance(block, ConvNormAct)
            for child in block.modules()
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and id(module) not in inside:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _checked_indices(out_indices: Sequence[int] | None, count: int) -> list[int]:
    if out_indices is None:
        return list(range(count))
    indices = list(out_indices)
    if not indices or any(not -count <= index < count for index in indices):
        raise ValueError(f"out_indices must name some of the {count} feature maps (0 to {count - 1}), got {indices}")
    picked = [index % count for index in indices]
    if len(set(picked)) != len(picked):
        raise ValueError(f"out_indices must be distinct, got {indices}")
    return picked


@contextlib.contextmanager
def _statistics_stay(module: nn.Module) -> Iterator[None]:
    """Batch statistics, without a second update of the running ones."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
