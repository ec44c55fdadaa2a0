"""Random constructor arguments for every block: legal ones, and a few replaced by extreme or senseless values."""

import inspect
import math

import numpy as np
import torch
from torch import nn

import repkern.nn
from repkern.nn import RepBlock

EXPORTED = [getattr(repkern.nn, name) for name in repkern.nn.__all__]
KINDS = [kind for kind in EXPORTED if isinstance(kind, type) and issubclass(kind, RepBlock) and kind is not RepBlock]
KINDS += [repkern.nn.RepGhostModule, repkern.nn.SqueezeExcite]

SIX = ("origin", "avg", "prior", "1x1-KxK", "1x1", "dw-pw")
SEVEN = ("1x1", "1x1_kxk", "1x1_avg", "kxk", "1xk", "kx1", "id")
ACTIVATIONS = (None, nn.ReLU, nn.SiLU, nn.PReLU, nn.Hardswish, nn.Identity)
# Legal values by name of the argument; a new argument needs a line here.
LEGAL = {
    "in_channels": (1, 2, 3, 4, 6, 8),
    "out_channels": (1, 2, 3, 4, 6, 8),
    "channels": (1, 2, 3, 8),
    "reduced_channels": (1, 2, 5),
    "kernel_size": (1, 3, 3, 5, 7, (3, 3), [5, 5]),
    "stride": (1, 1, 2, (2, 1), 3),
    "padding": (None, 0, 1, 2, (1, 2), (0, 3), "same", "valid"),
    "dilation": (1, 1, 2, (1, 2), 3),
    "groups": (1, 1, 2, 3, 4),
    "padding_mode": ("zeros", "zeros", "reflect", "replicate", "circular"),
    "recompute": ("none", "cheap"),
    "bias": (True, False),
    "use_affine": (True, False),
    "reduce_gamma": (False, True),
    "gamma_init": (None, 0.25, 1),
    "train_scales": ("all", "identity", "none"),
    "dense_scale": (1.0, 0.5, -2),
    "pointwise_scale": (1.0, 0.0, 3),
    "identity_scale": (1.0, 0.1),
    "internal_channels": (None, 1, 2, 6, 12),
    "identity_reduce": (None, True, False),
    "single_init": (False, True),
    "border": ("exact", "released", "zeros"),
    "branches": (None, ("kxk",), ("kxk", "1x1"), ("kxk", "1xk", "kx1"), ("origin",), ("origin", "prior"), SIX, SEVEN),
    "num_conv_branches": (1, 2, 4),
    "se": (None, None, 1, 3),
    "post_se": (None, None, 2),
    "strided_reduce": (True, False),
    "scaling": ("vector", "scalar", "none"),
    "initial": ("paper", "plain"),
    "expansion": (8, 1, 3),
    "factors": ("orepa", "plain", ("orepa", "plain")),
    "average": (False, True),
    "depthwise_size": (3, 1, 5),
    "depthwise_dilation": (1, 2),
    "norm_identity": (True, False),
    "raw_identity": (True, False),
    "gate": ("sigmoid", "hardsigmoid"),
    "device": (None,),
    "dtype": (torch.float64,),
}  # fmt: skip
HUGE = (2**15, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)
ODD_NUMBERS = (0, -1, -(2**31), -(2**63), *HUGE, 1.5, 3.0, 1e300, math.nan, math.inf, -math.inf, 2j, True, False)
SENSELESS = (None, "", "x", b"3", [], (), (1,), (1, 2, 3), (3, "a"), (2**62, 1), (1, -1), (math.nan, 3), {}, {3})
SENSELESS += (range(2), object(), int, nn.ReLU, np.int64(3), np.float32(3), np.array([3, 3]))
SENSELESS += ("tensor", "tensors", "list")  # made anew by `extreme`


def extreme(rng):
    """A value that is out of place for most arguments."""
    value = rng.choice(ODD_NUMBERS if rng.random() < 0.6 else SENSELESS)
    if isinstance(value, str) and value == "tensor":
        return torch.tensor(rng.choice((3, 2.5, math.nan)))
    if isinstance(value, str) and value == "tensors":
        return torch.randn(rng.choice((2, 4)), dtype=torch.float64)
    if isinstance(value, str) and value == "list":
        return [rng.choice(ODD_NUMBERS), rng.choice(ODD_NUMBERS)]
    return value


def legal(name, rng):
    if name == "activation":
        made = rng.choice(ACTIVATIONS)
        return made if made is None else made()
    return rng.choice(LEGAL[name])


def arguments(rng):
    """(class, keyword arguments): half of them as a user would give them, half with one to three extreme values."""
    kind = rng.choice(KINDS)
    names = list(inspect.signature(kind).parameters)
    given = {name: legal(name, rng) for name in names if needed(kind, name) or rng.random() < 0.5}
    given["dtype"] = torch.float64
    if rng.random() < 0.4 and "groups" in names:
        depthwise = rng.choice((2, 3, 4, 6))
        given |= {"in_channels": depthwise, "out_channels": depthwise, "groups": depthwise}
    if rng.random() < 0.5:
        for name in rng.sample(names, rng.choice((1, 1, 2, 3))):
            given[name] = extreme(rng)
    return kind, given


def needed(kind, name):
    return inspect.signature(kind).parameters[name].default is inspect.Parameter.empty
