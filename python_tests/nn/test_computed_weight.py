"""The `weight` of convolutions that compute it: read with gradient, written through, never lost."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import repkern
from repkern.nn import CSLABlock, CSLAConv2d, DiracConv2d, OREPABlock, OREPAConv2d, TrivialRepConv2d, group_squeeze

KINDS = (OREPAConv2d, CSLAConv2d, DiracConv2d, TrivialRepConv2d)
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind, ci=4, co=6, k=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return kind(ci, co, k, padding=k // 2, dtype=dtype, **options)


def holds(conv, wanted):
    """The next forward uses this kernel."""
    x = torch.randn(2, conv.in_channels, 7, 8, dtype=torch.float64)
    expected = functional.conv2d(x, wanted, conv.bias, conv.stride, conv._pad, conv.dilation, conv.groups)
    assert torch.allclose(conv(x), expected, rtol=0, atol=1e-12 * expected.abs().max().item() + 1e-14)
    assert torch.allclose(conv.weight, wanted, rtol=0, atol=1e-12)


@kinds
@pytest.mark.parametrize("geometry", [(4, 6, 3, 1), (4, 4, 5, 2), (6, 6, 3, 6), (5, 4, 1, 1)])
def test_it_is_the_kernel_of_the_next_forward(kind, geometry):
    ci, co, k, groups = geometry
    conv = made(kind, ci, co, k, groups=groups)
    assert isinstance(conv, nn.Conv2d)
    assert not isinstance(conv.weight, nn.Parameter)
    holds(conv, conv.weight.detach().clone())
    x, toward = torch.randn(2, ci, 7, 8, dtype=torch.float64), torch.randn(2, co, 7, 8, dtype=torch.float64)
    own = [p for p in conv.kernel_parameters() if p.requires_grad]
    ours = torch.autograd.grad((conv(x) * toward).sum(), own)
    read = functional.conv2d(x, conv.weight, conv.bias, padding=k // 2, groups=groups)
    theirs = torch.autograd.grad((read * toward).sum(), own)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    assert torch.equal(conv._conv_forward(x, conv.weight, conv.bias), read)
    assert (conv.transposed, conv.output_padding) == (False, (0, 0))


WRITES = {
    "assigned": lambda conv, value: setattr(conv, "weight", value),
    "assigned as a parameter": lambda conv, value: setattr(conv, "weight", nn.Parameter(value)),
    "data assigned": lambda conv, value: setattr(conv.weight, "data", value),
    "data copied": lambda conv, value: conv.weight.data.copy_(value),
    "detached": lambda conv, value: conv.weight.detach().copy_(value),
    "element by element": lambda conv, value: [conv.weight.data[at].copy_(value[at]) for at in range(len(value))],
    "by an index": lambda conv, value: conv.weight.data.__setitem__(slice(None), value),
    "by a view": lambda conv, value: conv.weight.data.view(-1).copy_(value.flatten()),
    "by chunks": lambda conv, value: [
        a.copy_(b) for a, b in zip(conv.weight.data.chunk(2), value.chunk(2), strict=True)
    ],
    "out=": lambda conv, value: torch.add(value, 0, out=conv.weight.data),
    "foreach": lambda conv, value: torch._foreach_copy_([conv.weight.data], [value]),
    "zeroed, added": lambda conv, value: conv.weight.data.zero_().add_(value),
}


@kinds
@pytest.mark.parametrize("how", WRITES)
def test_what_is_written_is_used(kind, how):
    conv = made(kind)
    bias = conv.bias.detach().clone()
    value = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    WRITES[how](conv, value)
    holds(conv, value)
    assert torch.equal(conv.bias, bias)
    assert "weight" not in conv.__dict__
    assert "weight" not in conv._parameters


@kinds
@pytest.mark.parametrize(
    "initialize",
    [
        lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
        lambda w: nn.init.trunc_normal_(w, std=0.02),
        nn.init.xavier_uniform_,
        nn.init.orthogonal_,
        nn.init.dirac_,
        lambda w: nn.init.constant_(w, 0.5),
        lambda w: w.data.normal_(0.0, 0.02),
    ],
)
def test_initializers(kind, initialize):
    conv, plain = made(kind), nn.Conv2d(4, 6, 3, dtype=torch.float64)
    for module in (conv, plain):
        torch.manual_seed(3)
        initialize(module.weight)
    assert torch.allclose(conv.weight, plain.weight, rtol=0, atol=1e-13)


@kinds
def test_a_write_that_cannot_be_is_refused(kind):
    conv = made(kind)
    before = {name: tensor.clone() for name, tensor in conv.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"under torch\.no_grad\(\)|modified inplace"):
        conv.weight.mul_(2)
    with pytest.raises(ValueError, match=r"is \[6, 4, 3, 3\], got \[6, 3, 3, 3\]"):
        conv.weight = torch.zeros(6, 3, 3, 3)
    with pytest.raises(TypeError, match="NoneType"):
        conv.weight = None
    with pytest.raises(ValueError, match="read-only"):
        conv.weight.detach().numpy()[...] = 0
    with pytest.raises(ValueError, match="computed from its branches"):
        nn.utils.prune.l1_unstructured(conv, "weight", 0.5)
    with pytest.raises(KeyError):
        torch.optim.SGD([{"params": conv._parameters["weight"]}])
    read = conv.weight
    with torch.no_grad():
        for parameter in conv.kernel_parameters():
            parameter.add_(0.0)
    with pytest.raises(RuntimeError, match="read before its parameters changed"), torch.no_grad():
        read.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in conv.state_dict().items())


def test_without_a_solution_it_is_refused():
    conv = made(OREPAConv2d)
    conv._scale_rows().data[0].zero_()
    with pytest.raises(ValueError, match="scale of `origin` is 0"):
        conv.weight.data.zero_()


@kinds
def test_freezing_by_the_weight(kind):
    conv = made(kind)
    trained = [name for name, p in conv.named_parameters() if p.requires_grad]
    conv.weight.requires_grad = False
    assert not conv.weight.requires_grad
    assert [name for name, p in conv.named_parameters() if p.requires_grad] == ["bias"]
    conv.weight.requires_grad_(True)
    assert [name for name, p in conv.named_parameters() if p.requires_grad] == trained
    with torch.no_grad():
        assert conv.weight.requires_grad


@kinds
def test_copies_of_it_are_plain(kind):
    conv = made(kind)
    wanted = conv.weight.detach().clone()
    buffer = io.BytesIO()
    torch.save(conv.weight.detach(), buffer)
    buffer.seek(0)
    for own in (copy.deepcopy(conv.weight), pickle.loads(pickle.dumps(conv.weight.detach())), torch.load(buffer)):
        assert type(own) is torch.Tensor
        assert torch.equal(own, wanted)
        own.data.zero_()
    assert np.array_equal(conv.weight.detach().numpy(), wanted.numpy())
    holds(conv, wanted)


@kinds
def test_common_surgery(kind):
    conv = made(kind)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    norm = nn.BatchNorm2d(6, dtype=torch.float64).eval()
    norm.running_mean.normal_()
    wanted = norm(conv.eval()(x))
    fused = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
    assert torch.allclose(fused(x), wanted, atol=1e-12)
    down, up = torch.randn(2, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    added = (up @ down)[:, :, None, None]  # as LoRA adds it
    lora = functional.conv2d(x, conv.weight + added, conv.bias, padding=1)
    assert torch.allclose(
        lora, conv(x) + functional.conv2d(x, added.expand(-1, -1, 3, 3).contiguous(), None, padding=1)
    )


@kinds
def test_under_compile_and_transforms(kind):
    conv = made(kind, dtype=torch.float32)
    x = torch.randn(2, 4, 7, 8)

    def by_weight(x):
        return functional.conv2d(x, conv.weight, conv.bias, padding=1)

    assert torch.allclose(torch.compile(by_weight, backend="aot_eager", fullgraph=True)(x), conv(x), atol=1e-5)

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return functional.conv2d(x, self.conv.weight, self.conv.bias, padding=1)

    with pytest.raises(RuntimeError, match=r"torch\.fx cannot trace code that reads the computed weight"):
        torch.fx.symbolic_trace(Parent())


def attribute_walk(model):
    """As detectors group their parameters."""
    found = []
    for module in model.modules():
        for name in ("weight", "bias"):
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                found.append(parameter)
    return found


@pytest.mark.parametrize("kind", [*KINDS, OREPABlock, CSLABlock])
def test_every_parameter_is_found_once(kind):
    block = kind(4, 4, 3)
    assert sorted(map(id, attribute_walk(block))) == sorted(map(id, block.parameters()))
    vectors = {name for name, p in block.named_parameters() if p.dim() == 1}
    scales = {name for name, _ in block.named_parameters() if "scale" in name}
    assert scales <= vectors  # so that they are not decayed by rules that go by the number of dimensions


EARLIER = {
    OREPAConv2d: {**{f"{name}.weight": name for name in (
        "origin", "avg", "prior", "pointwise", "reduce", "expand", "depthwise", "project", "scale")}},
    CSLAConv2d: {f"{name}.weight": name for name in ("dense_scale", "pointwise_scale", "identity_scale")},
    CSLABlock: {f"{name}.weight": name for name in ("dense_scale", "pointwise_scale", "identity_scale")},
    DiracConv2d: {"deviation.weight": "weight", "scale.weight": "scale", "identity_scale.weight": "identity_scale"},
}  # fmt: skip


@pytest.mark.parametrize("kind", EARLIER)
@pytest.mark.parametrize("prefix", ["", "0."])
def test_state_dicts_of_earlier_versions_load(kind, prefix):
    source, target = kind(4, 4, 3), kind(4, 4, 3)
    state = {f"{prefix}{EARLIER[kind].get(name, name)}": t.clone() for name, t in source.state_dict().items()}
    if kind is OREPAConv2d:
        state[f"{prefix}scale"] = state[f"{prefix}scale"].view(6, 4)
    holder = nn.Sequential(target) if prefix else target
    given = dict(state)
    for load in (lambda: holder.load_state_dict(state), lambda: repkern.load_checkpoint(given, holder)):
        for parameter in target.parameters():
            parameter.data.zero_()
        load()
        assert all(torch.equal(t, source.state_dict()[name]) for name, t in target.state_dict().items())
    assert state.keys() == given.keys()


def test_a_copy_made_inside_a_grouped_forward():
    """As moving averages are updated by hooks."""
    model = nn.Sequential(OREPAConv2d(3, 4, 3), nn.ReLU(), OREPAConv2d(4, 4, 3))
    group_squeeze(model)
    copies = []
    model[1].register_forward_hook(
        lambda module, args, output: copies.append((copy.deepcopy(model), pickle.dumps(model[2])))
    )
    x = torch.randn(1, 3, 9, 9)
    wanted = model(x)
    assert torch.equal(copies[0][0](x), wanted)
    assert pickle.loads(copies[0][1]).grouped is None


def test_filters_keep_their_precision_in_half():
    conv = OREPAConv2d(8, 8, 5)
    wanted = conv.prior_filter.clone()
    conv.set_prior_filter(wanted + 1 / 3)
    for convert in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.float()):
        convert(conv)
        assert torch.equal(conv.prior_filter, wanted + 1 / 3)
    fresh = OREPAConv2d(8, 8, 5).half()
    assert torch.equal(fresh.prior_filter, wanted)
    assert torch.equal(fresh.double().prior_filter, OREPAConv2d(8, 8, 5, dtype=torch.float64).prior_filter)
    assert OREPAConv2d(8, 8, 5, device="meta").half().to_empty(device="cpu").prior_filter.dtype is torch.float32
