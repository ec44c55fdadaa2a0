"""Replacing, training and deploying real networks; skipped where their packages are not installed."""

import copy

import pytest
import torch
from compat_matrix.networks import NETWORKS, images, output_of
from compat_matrix.values import close
from torch import nn

from repkern import reparameterize, replace_convs
from repkern.nn import OREPABlock, OREPAConv2d, RepBlock

INSTALLED = [network for network in NETWORKS if network.installed]
every_network = pytest.mark.parametrize("network", INSTALLED, ids=lambda network: network.name)
EQUAL = 1e-8  # float64; networks are dozens of layers deep
# Outputs between guard bytes are views, which activations of these networks could not write to in place.
pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason="no torchvision, timm or segmentation_models_pytorch"),
    pytest.mark.unguarded,
]


def by_attribute(model):
    """Groups as detectors make them."""
    found = {}
    for module in model.modules():
        for name in ("weight", "bias"):
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                assert id(parameter) not in found, f"{name} of {type(module).__name__} is found twice"
                found[id(parameter)] = parameter
    return list(found.values())


def train_step(model, x, inside=RepBlock):
    """One step, in which every trainable parameter of a block gets a gradient."""
    parameters = by_attribute(model)
    blocks = [module for module in model.modules() if isinstance(module, inside)]
    assert blocks
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    output_of(model.train(), x).square().mean().backward()
    known = {id(parameter) for parameter in parameters}
    for block in blocks:
        for name, parameter in block.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                assert id(parameter) in known, f"{name} is in no group"
                assert torch.isfinite(parameter.grad).all(), name
    trained = [any(p.grad is not None for p in block.parameters()) for block in blocks]
    assert sum(trained) >= 0.8 * len(trained), "blocks without gradients"  # the rest belongs to auxiliary outputs
    optimizer.step()
    model.eval()


def check_deployed(model, x):
    wanted = output_of(model, x)
    deployed = reparameterize(model, verify=x)
    assert not any(isinstance(module, RepBlock) for module in deployed.modules())
    close(output_of(deployed, x), wanted, "deployed", EQUAL)


@every_network
@pytest.mark.parametrize("preserve", [True, False], ids=["preserve", "fresh"])
def test_orepa_convs(network, preserve):
    model, x = network.make(), images()
    before = output_of(model, x)
    replaced = replace_convs(copy.deepcopy(model), OREPAConv2d, preserve=preserve)
    after = output_of(replaced, x)
    assert after.shape == before.shape
    if preserve:
        close(after, before, "the preserved function", EQUAL)
    else:
        assert not torch.equal(after, before)
    train_step(replaced, x)
    check_deployed(replaced, x)


@every_network
def test_norms_taken_over(network):
    model, x = network.make(), images()
    before = output_of(model, x)

    def is_small(name, conv):
        return conv.kernel_size[0] in (3, 5) and conv.out_channels <= 256

    if not any(isinstance(m, nn.Conv2d) and is_small("", m) for m in model.modules()):
        return
    replaced = replace_convs(copy.deepcopy(model), OREPABlock, where=is_small, preserve=True, fold_norm=True)
    close(output_of(replaced, x), before, "the preserved function", EQUAL)
    train_step(replaced, x)
    check_deployed(replaced, x)
