"""replace_convs and reparameterize on whole models: sharing, hooks, flags, what is left alone and what is reported."""

import copy
import functools
import logging
import pickle

import pytest
import torch
from torch import nn

import repkern
from repkern import OREPAConv2d, reparameterize, replace_convs
from repkern.nn import OREPABlock, OREPADeepStem, OREPARepVGGBlock, ReplaceReport
from repkern.testing import assert_close


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """Registration order is not calling order, a block is used twice, and one convolution has no norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.stem = nn.Conv2d(3, 6, 7, 2, 3)
        self.body = nn.Sequential(Residual(6), nn.Sequential(Residual(6)))
        self.again = self.body[0]
        self.even = nn.Conv2d(6, 6, 2)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding_mode="reflect", padding=1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = self.again(self.body(torch.relu(self.norm(self.stem(x)))))
        return self.head(torch.relu(self.depthwise(self.even(x)))).mean((2, 3))


ELIGIBLE = ["stem", "body.0.conv1", "body.0.conv2", "body.1.0.conv1", "body.1.0.conv2", "depthwise", "head"]


def trained(model, images=None):
    """Statistics that a few batches leave behind; in eval mode."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 16, 16, dtype=next(model.parameters()).dtype) if images is None else images)
    return model.eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16)


def largest(tensor):
    return float(tensor.detach().abs().max())


def test_every_eligible_convolution_is_replaced_in_place_and_reported(x, caplog):
    model, report = Net(), ReplaceReport()
    with caplog.at_level(logging.INFO, logger="repkern"):
        assert replace_convs(model, report=report) is model
    assert report.replaced == ELIGIBLE
    assert report.skipped == {"even": "kernel 2x2 is even"}
    assert "even: kernel 2x2 is even" in caplog.text
    assert isinstance(model.even, nn.Conv2d)
    assert all(isinstance(model.get_submodule(name), OREPAConv2d) for name in ELIGIBLE)
    assert model.again is model.body[0]
    model(x).sum().backward()


def test_where_picks():
    report = ReplaceReport()
    replace_convs(model := Net(), where=lambda name, conv: conv.kernel_size == (1, 1), report=report)
    assert report.replaced == ["head"]
    assert report.skipped["stem"] == "not picked by `where`"
    assert isinstance(model.stem, nn.Conv2d)


@pytest.mark.parametrize("kind", [OREPAConv2d, OREPABlock, OREPARepVGGBlock])
def test_preserve_starts_as_the_old_function(kind):
    model = trained(Net().double())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    replace_convs(model, kind, preserve=True, where=lambda name, conv: name != "head")
    assert isinstance(model.stem, kind)
    assert_close(model(x), expected, 1e-12 * largest(expected), "after replacing")


def test_preserve_gives_the_old_kernel_within_rounding():
    conv = nn.Conv2d(16, 24, 3)
    new = replace_convs(copy.deepcopy(conv), preserve=True)
    weight, bias = new.equivalent_kernel_bias()
    # One rounding of origin, then the squeeze's: in units of the branches' size, which is what cancels.
    unit = torch.finfo(torch.float32).eps
    assert_close(weight, conv.weight, 64 * unit * largest(new.origin), "kernel")
    assert torch.equal(bias, conv.bias)


@pytest.mark.parametrize("kind", [OREPABlock, OREPARepVGGBlock])
def test_fold_norm_takes_the_following_norm_over(kind):
    model = trained(Net().double())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected, norm, report = model(x), model.norm, ReplaceReport()
    replace_convs(model, kind, preserve=True, fold_norm=True, report=report, where=lambda n, c: n != "head")
    assert report.folded == {
        "stem": "norm",
        "body.1.0.conv1": "body.1.0.bn1",
        "body.1.0.conv2": "body.1.0.bn2",
    }  # body.0 runs twice, so its norms are not one convolution's
    assert isinstance(model.norm, nn.Identity)
    assert (kind is OREPABlock) == (getattr(model.stem, "bn", None) is norm)
    assert_close(model(x), expected, 1e-12 * largest(expected), "after folding")


def test_fold_norm_with_preserve_keeps_the_training_function_of_an_adopted_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    other = replace_convs(copy.deepcopy(model), OREPABlock, preserve=True, fold_norm=True)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    expected = model(x)
    assert_close(other(x), expected, 1e-12 * largest(expected), "train output")
    model.eval(), other.eval()
    assert_close(other(x), model(x), 1e-12 * largest(model(x)), "eval output after one step")


def test_fold_norm_without_a_trace_uses_sequential_neighbours(caplog):
    class Branching(nn.Sequential):
        pass

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Branching(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(self.body(x))) if x.sum() > 0 else self.body(x)

    report = ReplaceReport()
    with caplog.at_level(logging.INFO, logger="repkern"):
        replace_convs(Untraceable(), OREPABlock, fold_norm=True, report=report)
    assert report.folded == {"body.0": "body.1"}
    assert "tracing failed" in caplog.text


def test_fold_norm_needs_a_block_with_a_norm():
    with pytest.raises(ValueError, match="OREPAConv2d has none"):
        replace_convs(Net(), fold_norm=True)


def test_preserve_with_a_block_that_cannot():
    with pytest.raises(ValueError, match="OREPADeepStem cannot start as a given convolution"):
        replace_convs(Net(), OREPADeepStem, preserve=True)


def test_a_block_that_does_not_fit_a_convolution_leaves_it():
    report = ReplaceReport()
    model = replace_convs(Net(), OREPADeepStem, report=report)
    assert report.replaced == ["stem"]
    assert "kernel_size must be at least 5" in report.skipped["head"]
    assert isinstance(model.stem, OREPADeepStem)


def test_any_callable_with_conv_arguments_is_a_block():
    model = replace_convs(Net(), lambda *args, **kwargs: OREPAConv2d(*args, **kwargs, scaling="scalar"))
    assert model.stem.scaling == "scalar"
    assert model.depthwise.padding_mode == "reflect"


def test_a_partial_of_a_block_adds_options():
    block, report = functools.partial(OREPABlock, scaling="none", expansion=2), ReplaceReport()
    model = replace_convs(Net(), block, fold_norm=True, report=report)
    assert model.stem.conv.scaling == "none"
    assert model.stem.conv.expansion == 2
    assert report.folded["stem"] == "norm"


def test_the_root_itself():
    conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    new = replace_convs(conv, preserve=True)
    assert isinstance(new, OREPAConv2d)
    plain = reparameterize(new.eval())
    assert type(plain) is nn.Conv2d
    assert_close(plain.weight, conv.weight, 1e-14 * largest(new.origin) * 16, "round trip")


def test_flags_dtype_and_requires_grad_are_kept():
    model = Net().half()
    model.stem.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    model.body.eval()
    replace_convs(model)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert model.head.origin.requires_grad
    assert not model.head.bias.requires_grad
    assert model.stem.training
    assert not model.body[0].conv1.training


def test_convolutions_that_are_left_alone():
    class Causal(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)[..., :-1]

    class Named(nn.Conv2d):
        """Computes as nn.Conv2d does."""

    tied = nn.Conv2d(3, 3, 3)
    other = nn.Conv2d(3, 3, 3)
    other.weight = tied.weight
    model = nn.ModuleDict(
        {
            "causal": Causal(3, 3, 3),
            "named": Named(3, 3, 3),
            "rows": nn.Conv2d(3, 3, (3, 1)),
            "lazy": nn.LazyConv2d(3, 3),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
            "tied": tied,
            "other": other,
            "complex": nn.Conv2d(3, 3, 3, dtype=torch.complex64),
            "block": OREPARepVGGBlock(3, 3),
        }
    )
    report = ReplaceReport()
    replace_convs(model, report=report)
    assert report.replaced == ["named"]
    reasons = {
        "causal": "computes its own forward",
        "rows": "3x1 is not square",
        "lazy": "lazy",
        "normed": "parametrization",
        "tied": "shared",
        "other": "shared",
        "complex": "complex64",
    }
    assert set(report.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in report.skipped[name]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(2, 2, 2)), OREPABlock(2, 2, 3)])
def test_nothing_to_replace_warns(model):
    with pytest.warns(UserWarning, match="nothing to replace"):
        replace_convs(model)


def test_hooks_and_their_handles_survive(x):
    model, seen = Net().eval(), []
    forward = model.stem.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    model.stem.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    model.stem.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    trained(model)
    seen.clear()
    replace_convs(model)
    model(x.requires_grad_()).sum().backward()
    assert seen == ["before", "OREPAConv2d", "backward"]
    seen.clear()
    plain = reparameterize(model, inplace=True)
    plain(x).sum().backward()
    assert seen == ["before", "Conv2d", "backward"]
    seen.clear()
    forward.remove()
    plain(x)
    assert seen == ["before"]


# --- reparameterize


def test_whole_model_root_nested_shared_and_idempotent(x):
    model = trained(replace_convs(Net()))
    expected = model(x)
    plain = reparameterize(model, verify=x)
    assert isinstance(model.stem, OREPAConv2d), "the model given must stay"
    assert not any(isinstance(module, repkern.nn.RepBlock) for module in plain.modules())
    assert plain.again is plain.body[0]
    assert_close(plain(x), expected, 1e-5 * largest(expected), "plain output")
    assert reparameterize(plain, inplace=True) is plain
    assert set(plain.state_dict()) == set(Net().state_dict())
    Net().load_state_dict(plain.state_dict())
    assert reparameterize(model, inplace=True) is model
    assert type(model.stem) is nn.Conv2d


def test_a_model_without_blocks_comes_back_equal(x):
    model = trained(Net())
    again = reparameterize(model, verify=(x,))
    assert torch.equal(again(x), model(x))


def test_blocks_keep_flags(randomize):
    model = nn.Sequential(randomize(OREPABlock(3, 4, 3, activation=nn.ReLU())), randomize(OREPARepVGGBlock(4, 4)))
    model.requires_grad_(False).eval().double()
    plain = reparameterize(model)
    assert not any(p.requires_grad for p in plain.parameters())
    assert {p.dtype for p in plain.parameters()} == {torch.float64}
    assert not any(module.training for module in plain.modules())


def test_synchronized_norms_fold_as_well(randomize, x):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(randomize(OREPARepVGGBlock(3, 3)))).eval()
    assert isinstance(model[0].identity_bn, nn.SyncBatchNorm)
    reparameterize(model, verify=x)


def test_train_mode_warns(randomize):
    with pytest.warns(UserWarning, match="train mode"):
        plain = reparameterize(randomize(OREPABlock(3, 4, 3)))
    assert plain.training


def test_untouched_statistics_warn():
    with pytest.warns(UserWarning, match=r"never seen data.*: 0\.bn"):
        reparameterize(nn.Sequential(OREPABlock(3, 4, 3)).eval())


def test_nonfinite_statistics_warn(randomize):
    block = randomize(OREPARepVGGBlock(4, 4)).eval()
    block.identity_bn.running_var[1] = float("nan")
    with pytest.warns(UserWarning, match=r"NaN or infinite statistics: identity_bn"):
        reparameterize(block)


def test_a_norm_without_statistics_is_refused():
    block = OREPABlock(3, 4, 3).eval()
    block.bn = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match=r"block 0: .*track_running_stats=False"):
        reparameterize(nn.Sequential(block))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_names_parameters_that_are_not_finite(value, x):
    model = trained(replace_convs(Net()))
    model.body[1][0].conv2.expand.data[0, 0, 0, 0] = value
    reparameterize(model)
    with pytest.raises(ValueError, match=r"body\.1\.0\.conv2\.expand"):
        reparameterize(model, verify=x)


def test_verify_catches_a_wrong_block_and_says_which(x, monkeypatch):
    model = trained(replace_convs(Net()))
    broken, fuse = model.body[1][0].conv1, OREPAConv2d.fuse

    def wrong(self):
        plain = fuse(self)
        if self is broken:
            plain.weight.data[1, 2, 0, 1] += 1e-3
        return plain

    monkeypatch.setattr(OREPAConv2d, "fuse", wrong)
    with pytest.raises(
        ValueError, match=r"differs from the training form.*bound is.*body\.1\.0\.conv1 \(OREPAConv2d\)"
    ):
        reparameterize(model, inplace=True, verify=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_verify_accepts_rounding_in_a_deep_model(dtype, randomize):
    blocks = [randomize(OREPARepVGGBlock(8, 8, activation=nn.ReLU())) for _ in range(24)]
    model = nn.Sequential(*blocks).eval().to(dtype)
    for block in blocks:
        block.dense_bn.weight.data.mul_(0.3)
    reparameterize(model, verify=torch.randn(2, 8, 9, 9, dtype=dtype))


def test_verify_with_several_arguments_and_outputs(randomize):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = randomize(OREPABlock(3, 4, 3)), randomize(OREPABlock(3, 4, 3))

        def forward(self, x, y):
            return {"a": self.a(x), "rest": [self.b(y)], "count": 3}

    model = Two().eval()
    reparameterize(model, verify=(torch.randn(1, 3, 5, 5), torch.randn(1, 3, 5, 5)))


def test_verify_works_where_float64_does_not(randomize):
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = randomize(OREPABlock(3, 4, 3))

        def forward(self, x):
            return self.block(x.float())

    reparameterize(Single().eval(), verify=torch.randn(1, 3, 5, 5))


def test_verify_restores_training_flags(randomize, x):
    model = nn.Sequential(randomize(OREPABlock(3, 4, 3)), nn.BatchNorm2d(4))
    model[1].eval()
    with pytest.warns(UserWarning, match="train mode"):
        plain = reparameterize(model, verify=x)
    assert plain.training
    assert plain[0].training
    assert not plain[1].training


def test_converted_models_pickle_and_copy(x):
    model = trained(replace_convs(Net()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert torch.equal(reparameterize(other)(x), reparameterize(model)(x))


def test_the_conversion_others_do(x):
    """timm's: each child that has `fuse` is replaced by what it returns."""

    def fuse_children(module):
        for name, child in module.named_children():
            if hasattr(child, "fuse"):
                setattr(module, name, child.fuse())
            fuse_children(getattr(module, name))

    model = trained(replace_convs(Net()))
    expected = model(x)
    fuse_children(model)
    assert type(model.stem) is nn.Conv2d
    assert_close(model(x), expected, 1e-5 * largest(expected), "output")
