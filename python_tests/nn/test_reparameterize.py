"""reparameterize on whole models: what is converted, what is warned about, and what verification finds."""

import copy
import pickle

import pytest
import torch
from torch import nn

import repkern
from repkern import OREPAConv2d, reparameterize, replace_convs
from repkern.nn import OREPABlock, OREPARepVGGBlock
from repkern.testing import assert_close


def largest(tensor):
    return float(tensor.detach().abs().max())


def test_whole_model_root_nested_shared_and_idempotent(net, trained, x):
    model = trained(replace_convs(net()))
    expected = model(x)
    plain = reparameterize(model, verify=x)
    assert isinstance(model.stem, OREPAConv2d), "the model given must stay"
    assert not any(isinstance(module, repkern.nn.RepBlock) for module in plain.modules())
    assert plain.again is plain.body[0]
    assert_close(plain(x), expected, 1e-5 * largest(expected), "plain output")
    assert reparameterize(plain, inplace=True) is plain
    assert set(plain.state_dict()) == set(net().state_dict())
    net().load_state_dict(plain.state_dict())
    assert reparameterize(model, inplace=True) is model
    assert type(model.stem) is nn.Conv2d


def test_a_model_without_blocks_comes_back_equal(net, trained, x):
    model = trained(net())
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
def test_verify_names_parameters_that_are_not_finite(net, trained, value, x):
    model = trained(replace_convs(net()))
    model.body[1][0].conv2.expand.weight.data[0, 0, 0, 0] = value
    reparameterize(model)
    with pytest.raises(ValueError, match=r"body\.1\.0\.conv2\.expand"):
        reparameterize(model, verify=x)


def test_verify_catches_a_wrong_block_and_says_which(net, trained, x, monkeypatch):
    model = trained(replace_convs(net()))
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


def test_converted_models_pickle_and_copy(net, trained, x):
    model = trained(replace_convs(net()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert torch.equal(reparameterize(other)(x), reparameterize(model)(x))


def test_the_conversion_others_do(net, trained, x):
    """timm's: each child that has `fuse` is replaced by what it returns."""

    def fuse_children(module):
        for name, child in module.named_children():
            if hasattr(child, "fuse"):
                setattr(module, name, child.fuse())
            fuse_children(getattr(module, name))

    model = trained(replace_convs(net()))
    expected = model(x)
    fuse_children(model)
    assert type(model.stem) is nn.Conv2d
    assert_close(model(x), expected, 1e-5 * largest(expected), "output")


def test_training_flags_of_a_traced_model_stay():
    """Copying a GraphModule puts it in train mode."""
    model = nn.Sequential(OREPAConv2d(3, 4, 3), nn.BatchNorm2d(4))
    traced = torch.fx.symbolic_trace(model).eval()
    x = torch.randn(2, 3, 7, 7)
    plain = reparameterize(traced, verify=x)
    assert not any(module.training for module in plain.modules())
    assert torch.allclose(plain(x), traced(x), atol=1e-5)
