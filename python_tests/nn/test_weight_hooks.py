"""Weights that hooks compute: pruning, weight norm and spectral norm of the older and of the newer kind."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from repkern import reparameterize
from repkern.nn import OREPABlock, WinogradConv2d, fold
from repkern.nn._surgery import copied_model, move_hooks
from repkern.nn._weight_hooks import bias_in_forward, current_bias, current_weight, weight_in_forward
from repkern.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def pruned_twice(conv):
    prune.l1_unstructured(conv, "weight", 0.3)
    return prune.random_unstructured(conv, "weight", 2)


def pruned_direction(conv):
    """The mask belongs to what weight norm reads, and its hook runs after that of weight norm."""
    return prune.random_unstructured(nn.utils.weight_norm(conv), "weight_v", 0.4)


WAYS = {
    "plain": lambda conv: conv,
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "prune twice": pruned_twice,
    "prune bias": lambda conv: prune.random_unstructured(conv, "bias", 1),
    "weight_norm": nn.utils.weight_norm,
    "pruned direction": pruned_direction,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
}


def stepped(way, **options):
    """A convolution after a few optimizer steps: its attributes are those of the last forward."""
    conv = WAYS[way](nn.Conv2d(4, 4, 3, padding=1, **options))
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        conv(torch.randn(2, 4, 5, 5)).square().mean().backward()
        optimizer.step()
    return conv


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_current_weight_is_what_the_next_forward_in_eval_mode_uses(way, training, same):
    conv = stepped(way).train(training)
    before = copy.deepcopy(conv.state_dict())
    weight, bias = current_weight(conv), current_bias(conv)
    assert all(torch.equal(before[name], value) for name, value in conv.state_dict().items())
    x = torch.randn(1, 4, 6, 6)
    if way == "pruned direction":  # torch's two hooks run in an order in which the second forward has no gradients
        conv.eval()
        same(nn.functional.conv2d(x, weight, bias, padding=1), conv(x), 1e-6)
        return
    grads = torch.autograd.grad(
        nn.functional.conv2d(x, weight, bias, padding=1).sum(), list(conv.parameters()), allow_unused=True
    )
    conv.eval()
    expected = conv(x)
    wanted = torch.autograd.grad(expected.sum(), list(conv.parameters()), allow_unused=True)
    same(nn.functional.conv2d(x, weight, bias, padding=1), expected, 1e-6)
    for got, grad in zip(grads, wanted, strict=True):
        assert (got is None) == (grad is None)
        if got is not None:
            assert_close(got, grad, 1e-5 * float(grad.abs().max()), "gradient")


@pytest.mark.parametrize("way", WAYS)
def test_weight_in_forward_does_what_the_modules_own_forward_does(way, same):
    conv = stepped(way)
    twin = copied_model(conv)
    x = torch.randn(1, 4, 6, 6)
    got = nn.functional.conv2d(x, weight_in_forward(conv), bias_in_forward(conv), padding=1)
    same(got, twin(x), 1e-6)
    for name, value in twin.state_dict().items():
        assert torch.equal(conv.state_dict()[name], value), name


def test_reading_leaves_attribute_and_flags_as_they_are():
    conv = stepped("prune")
    attribute = conv.weight
    fresh = current_weight(conv)
    assert conv.weight is attribute
    assert not torch.equal(fresh, attribute)
    norm = stepped("parametrized spectral_norm")
    current_weight(norm)
    assert norm.training
    assert norm.parametrizations.weight[0].training


def test_no_bias_and_no_affine_norm_give_none():
    assert current_bias(stepped("prune", bias=False)) is None
    assert current_weight(nn.BatchNorm2d(3, affine=False)) is None


def test_a_weight_that_a_foreign_hook_computes_is_refused_by_name():
    class EqualizedLearningRate:
        def __call__(self, module, args):
            module.weight = module.raw * 0.1

    conv = nn.Conv2d(2, 2, 3)
    conv.raw = nn.Parameter(conv.weight.detach().clone())
    del conv.weight
    hook = EqualizedLearningRate()
    conv.register_forward_pre_hook(hook)
    hook(conv, ())
    for read in (current_weight, weight_in_forward):
        with pytest.raises(ValueError, match="EqualizedLearningRate"):
            read(conv)


def test_a_pruned_norm_is_folded_as_its_next_forward(randomize, same):
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    net = randomize(nn.Sequential(conv, norm)).eval()
    prune.random_unstructured(norm, "weight", 2)
    with torch.no_grad():
        norm.weight_orig.mul_(3)
    x = torch.randn(2, 3, 6, 6)
    weight, bias = fold.fuse_bn(conv.weight, conv.bias, norm)
    same(nn.functional.conv2d(x, weight, bias), net(x), 1e-5)


def test_winograd_takes_the_current_weight(same):
    conv = stepped("prune").eval()
    made = WinogradConv2d.from_conv(conv, tile=2).requires_grad_(False)
    x = torch.randn(1, 4, 8, 8)
    same(made(x), conv(x), 1e-5)


@pytest.mark.parametrize("way", ["prune", "weight_norm", "spectral_norm", "pruned direction"])
def test_a_model_with_such_weights_is_copied(way, randomize, same):
    """copy.deepcopy refuses tensors with a history."""
    model = nn.Sequential(stepped(way), randomize(OREPABlock(4, 4, 3))).eval()
    model[0](torch.randn(1, 4, 6, 6))
    x = torch.randn(1, 4, 6, 6)
    plain = reparameterize(model, verify=x)
    same(plain(x), model(x), 1e-5)
    with torch.no_grad():  # the copy has parameters of its own, and its hooks read those
        for parameter in model[0].parameters():
            parameter.zero_()
    assert plain(x).abs().max() > 0
    plain(x).sum().backward()
    assert next(plain[0].parameters()).grad is not None


def test_maps_that_a_forward_keeps_do_not_stop_a_copy(randomize):
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = randomize(OREPABlock(3, 4, 3))

        def forward(self, x):
            self.kept = {"features": [self.block(x)]}
            return self.kept["features"][0].relu()

    model = Keeps().eval()
    model(torch.randn(1, 3, 5, 5))
    plain = reparameterize(model, verify=torch.randn(1, 3, 5, 5))
    assert plain.kept["features"][0].requires_grad is False


def test_what_cannot_be_copied_is_named_with_what_to_do(randomize):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.stream = (value for value in ())

        def forward(self, x):
            return x

    model = nn.Sequential(randomize(OREPABlock(3, 4, 3)), nn.Sequential(Holder())).eval()
    with pytest.raises(ValueError, match=r"because of 1\.0 \(Holder\).*inplace=True.*prune\.remove"):
        reparameterize(model)
    assert type(reparameterize(model, inplace=True)[0]) is nn.Conv2d


def test_hooks_that_compute_the_weight_of_what_is_replaced_do_not_move():
    block, plain = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    prune.l1_unstructured(block, "weight", 0.5)
    seen = []
    block.register_forward_pre_hook(lambda module, args: seen.append(module))
    move_hooks(block, plain)
    plain(torch.randn(1, 3, 5, 5))
    assert seen == [plain]
