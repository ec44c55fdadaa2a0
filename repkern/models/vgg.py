"""VGG-16 for CIFAR, as ACNet, DBB, RepNAS and DyRep train it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from repkern.models.network import Feature, Network, Options, Step, plan_strides, scaled

__all__ = ["DEFAULT_BLOCK", "MODELS", "VGG"]

DEFAULT_BLOCK = "conv_bn"

MODELS = {"vgg16_cifar": ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))}


class _HalvingPool(nn.Module):
    """2x2 max pooling with stride 2; with stride 1 the same maxima, at every position of the undilated grid."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.stride, self.dilation = step.stride, step.first_dilation

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H / stride, W / stride]."""
        if self.stride > 1:
            return functional.max_pool2d(x, 2, self.stride)
        x = functional.pad(x, (0, self.dilation, 0, self.dilation), value=float("-inf"))
        return functional.max_pool2d(x, 2, 1, dilation=self.dilation)


class VGG(Network):
    """`stages.N.i` (3x3 blocks), `pools.N` behind each stage, `hidden` (512 features and a ReLU), `head`.

    Feature maps: the five stages before their pooling, at reductions 1, 2, 4, 8 and 16. The hidden layer is what makes
    the 15.0 M parameters of the papers' tables. Convolutions that are not part of a multi-branch block start as in He
    et al. 2015 (fan out). Images of at least 32 x 32.
    """

    def __init__(self, variant: tuple[tuple[int, int], ...], options: Options) -> None:
        super().__init__(options)
        steps = plan_strides((1, 2, 2, 2, 2, 2), options.output_stride)
        self.stages, self.pools = nn.ModuleList(), nn.ModuleList()
        before, features, order = options.in_chans, [], []
        for number, (published, count) in enumerate(variant):
            channels, dilation = scaled(published, options.width), steps[number].dilation
            layers = [
                self._make(before if at == 0 else channels, channels, 3, dilation=dilation) for at in range(count)
            ]
            self.stages.append(nn.Sequential(*layers))
            self.pools.append(_HalvingPool(steps[number + 1]))
            features.append(Feature(channels, steps[number].reduction, f"stages.{number}"))
            order += [f"stages.{number}", f"pools.{number}"]
            before = channels
        if not options.features_only:
            self.hidden = nn.Linear(before, before)
        self._finish(order, features, before)
        self._init_he()

    def _pooled(self, x: Tensor) -> Tensor:
        return torch.relu(self.hidden(super()._pooled(x)))
