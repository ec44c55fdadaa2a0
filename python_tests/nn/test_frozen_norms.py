"""Norms of other classes in the blocks: frozen ones as torchvision, DETR, detectron2 and timm write them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern import reparameterize
from repkern.nn import BLOCKS, fold
from repkern.nn._affine_norm import affine_norm
from repkern.nn.branch_sum import norm_scale_shift


class Frozen(nn.Module):
    """Buffers and an attribute, as torchvision's."""

    def __init__(self, like):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(like, name).detach().clone())
        self.eps = like.eps

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class ConstantEps(Frozen):
    """As DETR's: the number is in the code."""

    def __init__(self, like):
        super().__init__(like)
        del self.eps

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class CallsBatchNorm(Frozen):
    """As detectron2's and timm's."""

    def forward(self, x):
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


STYLES = [Frozen, ConstantEps, CallsBatchNorm]


def swapped(module, style):
    """The module with `style` in the place of every BatchNorm inside."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                parent._modules[name] = style(child)
    return module


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_every_block_computes_with_frozen_norms_what_it_does_with_batch_norms_in_eval_mode(
    kind, training, style, randomize, same
):
    block = randomize(BLOCKS[kind](4, 4, 3, padding=1)).double().eval()
    frozen = swapped(copy.deepcopy(block), style).train(training)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    mine, own = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = frozen(mine), block(own)
    same(got, expected, 1e-13)
    (grad,), (wanted,) = (
        torch.autograd.grad(got.square().sum(), mine),
        torch.autograd.grad(expected.square().sum(), own),
    )
    same(grad, wanted, 1e-12)
    plain = reparameterize(frozen.eval(), verify=x)
    same(plain(x), expected, 1e-13)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("border", ["exact", "released"])
@pytest.mark.parametrize("kind", ["dbb", "dyrep", "odbb"])
def test_inner_norms_with_both_borders_and_recomputed_maps(kind, border, style, randomize, same):
    options = {"border": border, "recompute": "cheap"}
    block = randomize(BLOCKS[kind](4, 6, 3, padding=1, **options)).double().eval()
    frozen = swapped(copy.deepcopy(block), style).train()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    frozen(x).square().sum().backward()
    block(x).square().sum().backward()
    wanted = dict(block.named_parameters())
    assert any(parameter.grad is not None for parameter in frozen.parameters())
    for name, parameter in frozen.named_parameters():
        same(parameter.grad, wanted[name].grad, 1e-11, name)


def test_frozen_norms_in_float32_train(randomize, same):
    block = swapped(randomize(BLOCKS["dbb"](4, 4, 3, padding=1)), Frozen)
    x = torch.randn(2, 4, 7, 7)
    block(x).sum().backward()
    same(reparameterize(block.eval(), verify=x)(x), block(x), 1e-5)


class Activated(Frozen):
    """As timm's norms with an activation inside."""

    def forward(self, x):
        return super().forward(x).relu()


class OtherEps(Frozen):
    def forward(self, x):
        return super().forward(x) * (self.running_var + self.eps).sqrt()[:, None, None]


class ActivatedBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    "norm",
    [
        Activated(nn.BatchNorm2d(4)),
        OtherEps(nn.BatchNorm2d(4)),
        ActivatedBatchNorm(4).eval(),
        nn.GroupNorm(2, 4),
        nn.Identity(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_what_is_not_one_scale_and_shift_is_refused(norm, randomize):
    """A BatchNorm that runs an activation as well was folded without it."""
    if hasattr(norm, "running_var"):
        norm.running_var.copy_(torch.tensor([0.5, 1, 2, 3]))
    with pytest.raises(TypeError, match=type(norm).__name__):
        norm_scale_shift(torch.randn(2, 4, 3, 3), norm)
    with pytest.raises(ValueError, match=type(norm).__name__):
        fold.fuse_bn(torch.randn(4, 3, 1, 1), None, norm)
    block = randomize(BLOCKS["repvgg"](4, 4, 3, padding=1)).eval()
    block.dense_bn = norm.eval()
    if not isinstance(norm, nn.Identity):
        with pytest.raises(ValueError, match=rf"block \(root\).*{type(norm).__name__}"):
            reparameterize(block)


def test_a_batch_norm_that_does_more_is_refused_in_training_too():
    block = swapped(BLOCKS["dbb"](4, 4, 3, padding=1), lambda norm: ActivatedBatchNorm(norm.num_features))
    with pytest.raises(TypeError, match="ActivatedBatchNorm does not compute what"):
        block(torch.randn(2, 4, 7, 7))


def test_judging_a_norm_changes_nothing_and_takes_no_random_numbers():
    norm = Frozen(nn.BatchNorm2d(3))
    state, random = copy.deepcopy(norm.state_dict()), torch.get_rng_state()
    assert affine_norm(norm).eps == 1e-5
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[name], value) for name, value in norm.state_dict().items())


def test_a_wrong_shape_is_named():
    norm = Frozen(nn.BatchNorm2d(3))
    norm.weight = torch.ones(2)
    with pytest.raises(TypeError, match=r"Frozen.weight must be a tensor \[3\] or None, got \(2,\)"):
        affine_norm(norm)


def test_a_pruned_inner_norm_trains(randomize):
    """Its weight is computed by a hook; the pass that updates the running statistics runs without gradients."""
    block = randomize(BLOCKS["dbb"](4, 4, 3, padding=1)).train()
    norm = (
        block.inner_bn
        if hasattr(block, "inner_bn")
        else next(
            module for name, module in block.named_modules() if "inner" in name and isinstance(module, nn.BatchNorm2d)
        )
    )
    nn.utils.prune.random_unstructured(norm, "weight", 1)
    block(torch.randn(2, 4, 7, 7)).square().sum().backward()
    assert norm.weight_orig.grad is not None
    assert norm.weight_orig.grad.abs().sum() > 0
