"""Hooks that compute weights, and norms that are swapped."""

import copy
import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from compat_matrix.table import tool
from compat_matrix.values import close, folds, gradients, plain_of, same_gradients, step, trains

HOOKS = "Pruning, weight norms and swapped norms"


def holders(block):
    """The modules inside that hold a kernel in a parameter `weight`."""
    return [
        (name, module)
        for name, module in block.named_modules()
        if isinstance(module._parameters.get("weight"), nn.Parameter) and module.weight.dim() > 1
    ]


def check_computed(case, apply, make_permanent):
    """After a step the deployed form is that of a block in which the computed weights were made permanent."""
    block, x = case.make(), case.images()
    for _, module in holders(block):
        apply(module)
    block(x)
    step(block, x)
    out = folds(block, x)
    folded = plain_of(block)(x)  # before: copies of a parametrized module share its class
    for module in list(block.modules()):
        make_permanent(module)
    close(block(x), out, "made permanent")
    close(folded, out, "folded before it was made permanent")
    trains(block, x)


@tool("`torch.nn.utils.prune`", HOOKS)
def pruned(case):
    """`l1_unstructured` on every kernel inside, then an optimizer step: the deployed form has the pruned kernels of the
    next forward, as after `prune.remove`."""

    def remove(module):
        if prune.is_pruned(module) and "weight_orig" in module._parameters:
            prune.remove(module, "weight")

    check_computed(case, lambda module: prune.l1_unstructured(module, "weight", 0.4), remove)


@tool("old `weight_norm`", HOOKS)
def old_weight_norm(case):
    """The hook of `torch.nn.utils.weight_norm` on every kernel inside, then an optimizer step; as after removal."""

    def apply(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(module)

    def remove(module):
        if "weight_g" in module._parameters:
            nn.utils.remove_weight_norm(module)

    check_computed(case, apply, remove)


@tool("old `spectral_norm`", HOOKS)
def old_spectral_norm(case):
    """The hook of `torch.nn.utils.spectral_norm` on every kernel inside, then an optimizer step; as after removal."""

    def remove(module):
        if "weight_orig" in module._parameters:
            nn.utils.remove_spectral_norm(module)

    check_computed(case, lambda module: nn.utils.spectral_norm(module), remove)


@tool("`parametrizations.weight_norm`", HOOKS)
def new_weight_norm(case):
    """torch's parametrization on every kernel inside, then an optimizer step; as after its removal."""

    def remove(module):
        if nn.utils.parametrize.is_parametrized(module, "weight"):
            nn.utils.parametrize.remove_parametrizations(module, "weight")

    check_computed(case, parametrizations.weight_norm, remove)


class FrozenNorm(nn.Module):
    """A norm of buffers, as torchvision's and detectron's detectors have it."""

    def __init__(self, norm):
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, name)
            default = torch.ones_like if name in ("weight", "running_var") else torch.zeros_like
            self.register_buffer(name, default(norm.running_mean) if value is None else value.detach().clone())

    def forward(self, x):
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def swap(module, make):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, make(child))
        else:
            swap(child, make)
    return module


@tool("frozen norms", HOOKS)
def frozen_norms(case):
    """Every norm swapped for one whose weight, bias and statistics are buffers: the same output, deployed too, and in
    train mode the gradients of norms in eval mode."""
    block, x = case.make(), case.images()
    other = swap(copy.deepcopy(block), FrozenNorm)
    close(folds(other, x), block(x), "output")
    block(x).square().sum().backward()
    other.train()(x).square().sum().backward()
    wanted = gradients(block)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in gradients(other).items():
        assert float((gradient - wanted[name]).abs().max()) <= 1e-10 * largest, f"gradient of {name}"


@tool("`SyncBatchNorm.convert_sync_batchnorm`", HOOKS)
def synchronized(case):
    """The same output and deployed form, and on one process the same training."""
    block, x = case.make(), case.images()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    close(folds(synced, x), block(x), "output")
    for module in (block, synced):
        module.train()(x).square().sum().backward()
    same_gradients(synced, block, "train mode")


@tool("frozen statistics", HOOKS)
def frozen_statistics(case):
    """Norms kept in eval mode while the block trains: running statistics stay, and training is that of eval mode."""
    block, x = case.make(), case.images()
    other = copy.deepcopy(block).train()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    close(other(x), block(x), "train mode with frozen statistics")
    before = [buffer.clone() for buffer in other.buffers()]
    other(x).square().sum().backward()
    block(x).square().sum().backward()
    same_gradients(other, block, "frozen statistics")
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), before, strict=True))
