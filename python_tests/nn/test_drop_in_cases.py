"""Single things that other people's code does with blocks, each once a silent fault or a raw error."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import prune

from repkern import reparameterize, replace_convs
from repkern.nn import (
    ACBlock,
    ConvNormAct,
    CSLABlock,
    CSLAConv2d,
    DiracConv2d,
    DiverseBranchBlock,
    DyRepBlock,
    MobileOneBlock,
    ODBBlock,
    OREPABlock,
    OREPAConv2d,
    OREPARepVGGBlock,
    QARepVGGBlock,
    ReplaceReport,
    RepVGGBlock,
    TrivialRepConv2d,
)


def images(size=7):
    return torch.randn(2, 4, size, size)


@pytest.mark.parametrize("kind", [OREPAConv2d, DiracConv2d, TrivialRepConv2d, DiverseBranchBlock, ODBBlock, OREPABlock])
@pytest.mark.parametrize("make", ["to_empty", "skip_init"])
def test_made_without_memory_then_loaded(kind, make):
    """Constants that no state_dict has are made anew."""
    reference = kind(4, 4, 3).eval()
    for parameter in reference.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    if make == "skip_init":
        block = nn.utils.skip_init(kind, 4, 4, 3)
    else:
        with torch.device("meta"):
            block = kind(4, 4, 3)
        block.to_empty(device="cpu")
    block.load_state_dict(reference.state_dict())
    x = images()
    assert torch.equal(block.eval()(x), reference(x))
    assert torch.equal(block.fuse()(x), reference.fuse()(x))


@pytest.mark.parametrize("read", [lambda w: w, lambda w: w.data, lambda w: w.detach()])
def test_a_parameter_made_of_a_weight_is_its_own(read):
    block, plain = OREPAConv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    plain.weight = nn.Parameter(read(block.weight))
    assert type(plain.weight) is type(copy.deepcopy(plain).weight) is nn.Parameter
    assert plain.weight.requires_grad
    kernel = block.weight.detach().clone()
    assert torch.equal(plain.weight, kernel)
    plain(images()).sum().backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    assert torch.equal(block.weight, kernel)
    assert not torch.equal(plain.weight, kernel)


@pytest.mark.parametrize("kind", [TrivialRepConv2d, DiracConv2d, OREPAConv2d, CSLAConv2d])
def test_plain_weights_are_not_taken_for_a_branchs(kind):
    conv = nn.Conv2d(4, 4, 3)
    block = replace_convs(copy.deepcopy(conv), kind)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"weight\""):
        block.load_state_dict(conv.state_dict())


@pytest.mark.parametrize(
    ("kind", "scale"), [(DiracConv2d, "scale"), (CSLAConv2d, "dense_scale"), (OREPAConv2d, "scale")]
)
def test_pruned_scales(kind, scale):
    block = kind(4, 4, 3)
    holder = getattr(block, scale)
    prune.random_unstructured(holder, "weight", amount=2)
    with torch.no_grad():
        holder.weight_orig.mul_(5)
    x = images()
    before, fused = block(x), block.fuse()(x)
    prune.remove(holder, "weight")
    assert torch.allclose(block(x), before, atol=1e-6)
    assert torch.allclose(fused, before, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        ACBlock,
        ConvNormAct,
        DiverseBranchBlock,
        MobileOneBlock,
        OREPABlock,
        OREPARepVGGBlock,
        QARepVGGBlock,
        RepVGGBlock,
    ],
)
def test_a_bias_that_folding_would_lose_is_refused(kind):
    block = kind(4, 4, 3, padding=1).eval()
    conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    conv.bias = nn.Parameter(torch.ones(4))
    block(images())
    with pytest.raises(ValueError, match="has a bias, which the block has no place for"):
        block.fuse()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.fill_(1)
    with pytest.raises(ValueError, match=r"block 0.*has a bias"):
        reparameterize(nn.Sequential(block))


@pytest.mark.parametrize("kind", [DyRepBlock, ODBBlock])
@pytest.mark.parametrize("part", ["dense", "pointwise", "reduce", "avg", "expand", "horizontal", "vertical"])
def test_a_bias_is_folded_or_refused(kind, part):
    block = kind(4, 4, 3, padding=1, dtype=torch.float64).eval()
    conv = getattr(block, part)
    conv.bias = nn.Parameter(torch.randn(conv.out_channels, dtype=torch.float64))
    x = images().double()
    if part not in ("dense", "pointwise"):
        with pytest.raises(ValueError, match=f"{part} has a bias"):
            block.fuse()
    else:
        assert torch.allclose(block.fuse()(x), block(x), rtol=0, atol=1e-10)


def test_a_part_with_a_forward_of_its_own_is_refused():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 2

    block = RepVGGBlock(4, 4, 3, padding=1).eval()
    for part in (Standardized(4, 4, 3, padding=1, bias=False), Adapter(block.dense)):
        block.dense = part
        block(images())
        with pytest.raises(ValueError, match=rf"RepVGGBlock\.dense is a {type(part).__name__}"):
            block.fuse()


def test_weights_in_inference_mode():
    block = OREPAConv2d(4, 4, 3)
    with torch.inference_mode():
        assert torch.equal(block.weight, block.kernel())
        made = CSLAConv2d(4, 4, 3)
    with torch.no_grad():
        assert torch.equal(made.weight, made.kernel())


def test_a_refused_write_changes_nothing():
    block = DiracConv2d(4, 4, 3)
    prune.l1_unstructured(block.deviation, "weight", 0.3)
    before = block.weight.detach().clone()
    with pytest.raises(ValueError, match="is not a parameter"):
        block.weight.data.mul_(3.0)
    assert torch.equal(block.weight, before)
    with pytest.raises(RuntimeError, match="transpose_ cannot be done in place"), torch.no_grad():
        block.weight.transpose_(0, 1)


def test_constant_scales_stay_constant():
    block = CSLAConv2d(4, 4, 3)
    block.weight.requires_grad_(False)
    block.weight.requires_grad_(True)
    frozen = [name for name, parameter in block.named_parameters() if not parameter.requires_grad]
    assert frozen == ["dense_scale.weight", "pointwise_scale.weight"]


def test_an_ensemble_of_networks():
    nets = [nn.Sequential(OREPABlock(4, 4, 3), OREPAConv2d(4, 4, 3)).eval() for _ in range(3)]
    x = images()
    outputs = vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(*stack_module_state(nets))
    for output, net in zip(outputs, nets, strict=True):
        assert torch.allclose(output, net(x), atol=1e-5)


@pytest.mark.parametrize("kind", [ACBlock, CSLABlock, DiverseBranchBlock, DyRepBlock, ODBBlock, RepVGGBlock])
def test_dilated_by_the_height_of_each_kernel(kind):
    """As some encoders do, also for 1xK kernels."""
    block = kind(4, 6, 3, 2, padding=1).eval()
    for conv in block.modules():
        if isinstance(conv, nn.Conv2d):
            height, _ = conv.kernel_size
            conv.stride, conv.dilation, conv.padding = (1, 1), (2, 2), (height // 2 * 2,) * 2
    x = images()
    assert block(x).shape == (2, 6, 7, 7)
    assert torch.allclose(block(x), block.fuse()(x), atol=1e-5)


def test_a_norm_is_left_whose_convolution_runs_twice():
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.f[0](x), self.f(x)

    report = ReplaceReport()
    with pytest.warns(UserWarning, match="nothing to replace"):
        replace_convs(Tapped(), OREPABlock, fold_norm=True, report=report)
    assert list(report.skipped) == ["f.0"]


@pytest.mark.parametrize("options", [{"expansion": 2**62}, {"expansion": 1.5}, {"internal_channels": 2**62}])
def test_counts_are_checked(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        OREPAConv2d(4, 4, 3, **options)


def test_an_input_that_is_no_tensor():
    for x in (None, [1.0], 3):
        with pytest.raises(TypeError, match="the input must be a tensor"):
            RepVGGBlock(4, 4, 3)(x)
