"""Every listed model: forward, backward, re-parameterization, and its state_dict into the plain model."""

import functools

import pytest
import torch

import repkern
from repkern.nn.kinds import KINDS

SMALL = 12e6  # parameters; larger networks are made narrower here, and at full width by `repkern bench equivalence`
NARROW = 0.125
SIZE = 32
EXACT = 1e-10  # float64, relative to the largest output
SINGLE = 1e-5
# Dense, after-ReLU squeeze-excite, basic units, grouped bottlenecks, depthwise, squeeze-excite, RepGhost's wiring.
FAMILIES = ("repvgg_a0", "repopt_vgg_b1_se", "resnet18", "resnext50_32x4d", "mobilenet_v1", "mobileone_s4",
            "repghostnet_050")  # fmt: skip


@functools.cache
def width(name):
    with torch.device("meta"):
        count = sum(p.numel() for p in repkern.create_model(name).parameters())
    return 1.0 if count < SMALL and not name.startswith("mobileone") else NARROW


def make(name, block=None, **options):
    return repkern.create_model(name, block=block, num_classes=7, width=options.pop("width", NARROW), **options)


@torch.no_grad()
def randomized(model):
    """Norms with statistics, scales and shifts that are not their initial values."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(1)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


@torch.no_grad()
def assert_same_function(model, plain, bound):
    """On the last feature map, before pooling hides anything, and on the logits."""
    x = torch.randn(1, 3, SIZE, SIZE, dtype=next(model.parameters()).dtype)
    trained, deployed = model.forward_features(x), plain.forward_features(x)
    for one, other in ((deployed, trained), (plain.forward_head(deployed), model.forward_head(trained))):
        largest = float(other.abs().max())
        assert largest > 1e-3, "the output says nothing"
        assert float((one - other).abs().max()) <= bound * largest


def check_conversion(model):
    plain = repkern.reparameterize(model)
    assert_same_function(model, plain, EXACT)
    assert not any(isinstance(module, repkern.nn.RepBlock) for module in plain.modules())
    fresh = repkern.create_model(**{**model.config, "block": "plain", "block_options": None}).double().eval()
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert list(fresh.state_dict()) == list(plain.state_dict())
    assert_same_function(plain, fresh, 0)


@pytest.mark.parametrize("name", repkern.list_models())
def test_every_model(name):
    model = make(name, width=width(name)).train()
    x = torch.randn(2, 3, 2 * SIZE if width(name) < 1 else SIZE, SIZE).requires_grad_()
    logits = model(x)
    assert logits.shape == (2, 7)
    torch.nn.functional.cross_entropy(logits, torch.tensor([1, 4])).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name
    assert torch.isfinite(x.grad).all()

    again = repkern.create_model(**model.config)
    again.load_state_dict(model.state_dict())
    assert_same_function(model.eval(), again.eval(), 0)
    randomized(model)
    assert_same_function(model, repkern.reparameterize(model), SINGLE)
    check_conversion(model.double())


@pytest.mark.parametrize("block", [kind for kind in KINDS if kind != "plain"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_block(name, block):
    model = randomized(make(name, block).double())
    assert model.block == block
    check_conversion(model)


@pytest.mark.parametrize("name", ["repvgg_a0", "resnet18", "mobilenet_v1", "mobileone_s0", "repghostnet_050"])
def test_plain_models_train_too(name):
    model = make(name, "plain").train()
    model(torch.randn(2, 3, SIZE, SIZE)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert repkern.reparameterize(model) is not model


@pytest.mark.parametrize("name", ["repvgg_a0", "resnet18", "repghostnet_050"])
@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_recompute_and_grad_checkpointing_change_nothing(name, recompute):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = make(name, "repvgg" if name != "repghostnet_050" else None, recompute=recompute).double().train()
        model.set_grad_checkpointing(checkpointing)
        x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64).requires_grad_()
        torch.manual_seed(2)
        y = model(x)
        y.square().sum().backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        results.append({"y": y.detach(), "x": x.grad, **gradients, **dict(model.named_buffers())})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_verified_conversion_of_a_network():
    model = randomized(make("resnet18", "dbb"))
    repkern.reparameterize(model, verify=torch.randn(1, 3, SIZE, SIZE))


def test_train_mode_warns():
    model = randomized(make("repvgg_a0")).train()
    with pytest.warns(UserWarning, match="train mode"):
        repkern.reparameterize(model)


@pytest.mark.parametrize("name", ["resnet50", "repghostnet_050", "vgg16_cifar"])
def test_deployed_networks_trace_and_export(name):
    """torch.fx (quantization, graph surgery) and torch.export with any batch size."""
    model = make(name, "plain").eval()
    x = torch.randn(2, 3, SIZE, SIZE)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
        more = torch.randn(3, 3, SIZE, SIZE)
        assert torch.equal(exported(more), model(more))


def test_training_compiles_to_one_graph():
    model = make("repvgg_a0", features_only=True, out_indices=(1,)).train()
    x = torch.randn(2, 3, SIZE, SIZE)
    (expected,) = model(x)
    (got,) = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(got, expected)
