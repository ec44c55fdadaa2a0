"""The blocks of the matrix: every class in several geometries and with its options."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import repkern.nn
from repkern.nn import DyRepBlock, RepBlock, RepGhostModule

EXPORTED = [getattr(repkern.nn, name) for name in repkern.nn.__all__]
KINDS = [kind for kind in EXPORTED if isinstance(kind, type) and issubclass(kind, RepBlock) and kind is not RepBlock]
KINDS.append(RepGhostModule)

# (in, out, groups, K, stride, padding, dilation, padding_mode)
GEOMETRIES = {
    "5x5": (4, 4, 2, 5, 1, None, 1, "zeros"),
    "3x3": (4, 4, 1, 3, 1, None, 1, "zeros"),
    "strided": (4, 6, 2, 3, 2, 1, 1, "zeros"),
    "5x5 strided": (3, 4, 1, 5, 2, 2, 1, "zeros"),
    "reflect": (4, 4, 2, 5, 1, None, 2, "reflect"),
    "depthwise": (6, 6, 6, 3, 1, None, 2, "zeros"),
    "uneven": (3, 6, 3, 5, (2, 1), (1, 4), 1, "circular"),
    "unpadded": (4, 4, 1, 3, 1, 0, 2, "zeros"),
    "replicate": (4, 4, 2, 3, 1, (0, 3), 1, "replicate"),
    "1x1": (5, 5, 1, 1, 1, None, 1, "zeros"),
    "1x1 strided": (4, 6, 2, 1, 2, 1, 1, "zeros"),
    "7x7": (3, 4, 1, 7, 2, 3, 1, "zeros"),
}
ACTIVATIONS = (None, nn.ReLU, nn.SiLU, nn.PReLU)
VARIANTS = {
    "OREPAConv2d": [{"scaling": "scalar"}, {"scaling": "none"}, {"branches": ("origin", "prior")}, {"bias": False}],
    "OREPABlock": [{"scaling": "scalar"}, {"expansion": 2, "internal_channels": 8}],
    "OREPARepVGGBlock": [{"se": 8, "recompute": "cheap"}, {"post_se": 2}],
    "OREPADeepStem": [{"factors": "plain"}, {"factors": ("orepa", "plain")}],
    "CSLABlock": [{"train_scales": "all"}, {"train_scales": "none"}],
    "CSLAConv2d": [{"train_scales": "all", "bias": False}],
    "DiracConv2d": [{"bias": False}],
    "TrivialRepConv2d": [{"bias": False}],
    "RepVGGBlock": [{"se": 8}, {"post_se": 2, "recompute": "cheap"}],
    "MobileOneBlock": [{"num_conv_branches": 3}, {"se": 8}],
    "QARepVGGBlock": [{"average": True, "se": 8}],
    "ACBlock": [{"reduce_gamma": True}, {"use_affine": False}],
    "DiverseBranchBlock": [{"recompute": "cheap", "internal_channels": 8}, {"identity_reduce": False}],
    "DyRepBlock": [{"branches": ("kxk", "1xk")}, {"recompute": "cheap"}],
    "ODBBlock": [{"strided_reduce": False}],
    "RepGhostModule": [{"raw_identity": True, "norm_identity": False}],
}


class Case(NamedTuple):
    """A block of one class: its name, the class, what makes it, and the geometry that it was asked for."""

    name: str
    kind: type
    construct: Callable[[], nn.Module]
    geometry: tuple

    def make(self):
        """A fresh block in float64, in eval mode, whose parameters and statistics are not their initial values."""
        torch.manual_seed(1)
        return randomized(self.construct()).double().eval()

    def images(self, count=3):
        torch.manual_seed(2)
        return torch.randn(count, channels_of(self.construct()), 11, 13, dtype=torch.float64)


def channels_of(block):
    return next(module.in_channels for module in block.modules() if hasattr(module, "in_channels"))


@torch.no_grad()
def randomized(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(1)
            if module.affine:
                module.bias.normal_(0, 0.5)
    for parameter in block.parameters():
        if parameter.numel() > 1 and parameter[0].numel() == 1 and not (parameter - parameter[0]).any():
            parameter.uniform_(0.3, 1.2)
        parameter.copy_(torch.where(parameter == 0, 0.2 * torch.randn_like(parameter), parameter))
    return block


def _constructor(kind, geometry, options):
    ci, co, groups, *rest, mode = geometry

    def construct():
        known = inspect.signature(kind).parameters
        given = {
            name: value() if isinstance(value, type) else value for name, value in options.items() if name in known
        }
        return kind(ci, co, *rest, groups, padding_mode=mode, **given)

    return construct


def _nested(inner):
    def construct():
        block = DyRepBlock(4, 4, 3, activation=nn.ReLU())
        part = getattr(block, inner)
        setattr(block, inner, DyRepBlock.grow(part, last_scale=0.5))
        return block

    return construct


def _cases():
    for kind in KINDS:
        smallest = {"OREPADeepStem": 5, "OREPARepVGGBlock": 3}.get(kind.__name__, 1)
        names = [name for name, geometry in GEOMETRIES.items() if geometry[3] >= smallest]
        for at, name in enumerate(names):
            activation = ACTIVATIONS[at % len(ACTIVATIONS)]
            geometry = GEOMETRIES[name]
            yield Case(name, kind, _constructor(kind, geometry, {"activation": activation}), geometry)
        for options in VARIANTS.get(kind.__name__, ()):
            shown = ", ".join(f"{name}={value}" for name, value in options.items())
            construct = _constructor(kind, GEOMETRIES["5x5"], {"activation": nn.ReLU, **options})
            yield Case(shown, kind, construct, GEOMETRIES["5x5"])
        if kind is DyRepBlock:
            for inner in ("dense", "expand"):
                yield Case(f"nested {inner}", kind, _nested(inner), GEOMETRIES["3x3"])


CASES = list(_cases())
