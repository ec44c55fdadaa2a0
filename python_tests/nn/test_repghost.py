"""RepGhostModule: both halves in training, and both folded."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern import reparameterize
from repkern.nn import RepGhostModule

F64 = {"dtype": torch.float64}


def two_halves(module, explicit):
    primary, fusion = module.primary, module.fusion

    def expected(x):
        y = explicit.normed(explicit.convolved(primary, x, primary.conv.weight), primary.bn)
        y = y if primary.activation is None else primary.activation(y)
        k = fusion.kernel_size[0]
        z = functional.conv2d(y, fusion.dense.weight, padding=k // 2, groups=y.shape[1])
        z = explicit.normed(z, fusion.dense_bn)
        z = z if fusion.identity_bn is None else z + explicit.normed(y, fusion.identity_bn)
        z = z + y if fusion.raw_identity else z
        return z if fusion.activation is None else fusion.activation(z)

    return expected


@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_training_and_conversion(recompute, explicit, randomize, same):
    for normed, raw, k in itertools.product((True, False), (True, False), (3, 5)):
        module = randomize(
            RepGhostModule(
                4,
                6,
                activation=nn.ReLU(),
                depthwise_size=k,
                norm_identity=normed,
                raw_identity=raw,
                recompute=recompute,
                **F64,
            )
        )
        assert (module.fusion.identity_bn is not None) == normed
        module.in_channels = 4
        explicit.check_training(module, two_halves(module, explicit), same, f"{normed} {raw} {k}")
        explicit.check_fused(module, same)


def test_the_first_convolution_is_any(explicit, randomize, same):
    module = randomize(RepGhostModule(4, 6, 3, 2, 0, 2, 2, padding_mode="reflect", **F64))
    module.in_channels = 4
    explicit.check_training(module, two_halves(module, explicit), same)
    explicit.check_fused(module, same)


def test_both_norms_are_folded_and_the_keys_agree(randomize, explicit, same):
    module = randomize(RepGhostModule(4, 6, activation=nn.ReLU(), **F64)).eval()
    assert module.primary.activation is not module.fusion.activation
    x = explicit.images(4)
    plain = reparameterize(module, verify=x)
    assert not any(isinstance(child, nn.BatchNorm2d) for child in plain.modules())
    halves = (f"{half}.conv" for half in ("primary", "fusion"))
    assert list(plain.state_dict()) == [f"{half}.{kind}" for half in halves for kind in ("weight", "bias")]
    fused = module.fuse()
    fused.load_state_dict(plain.state_dict())
    same(fused(x), plain(x), explicit.FUSED)
    again = reparameterize(plain)
    same(again(x), module(x), explicit.FUSED)


def test_half_precision_and_copies(randomize, explicit, same):
    module = randomize(RepGhostModule(4, 6, activation=nn.ReLU(), **F64))
    explicit.check_half(module.fusion)
    module.in_channels = 4
    explicit.check_every_parameter_is_used(module)
    explicit.check_life(module, same)
