"""branch_norm_sum and norm_scale_shift are torch's modules: outputs, gradients, buffers, errors, hooks."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from repkern.nn import RepVGGBlock, branch_sum
from repkern.nn._pointwise import pointwise_map
from repkern.nn.branch_sum import Branch, branch_norm_sum, norm_scale_shift

ROUNDING = 1e-12  # relative to the largest value, after a few steps in float64
CHANNELS = 5


class Sum(nn.Module):
    """conv3x3, conv1x1 and the input, each with one of `norms`, and an activation."""

    def __init__(self, norms, activation=None, own=True):
        super().__init__()
        self.dense = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.pointwise = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.norms = nn.ModuleList(nn.Identity() if norm is None else norm for norm in norms)
        self.activation = activation
        self.own = own

    def forward(self, x):
        norms = [None if isinstance(norm, nn.Identity) else norm for norm in self.norms]
        makes = (self.dense, self.pointwise, None)
        if self.own:
            return branch_norm_sum(x, [*map(Branch, norms, makes)], self.activation)
        total = 0
        for norm, make in zip(self.norms, makes, strict=True):
            total = total + norm(x if make is None else make(x))
        return total if self.activation is None else self.activation(total)


def pair(norms, activation=None, dtype=torch.float64):
    """The module on the op, and the same one on torch's modules."""
    own = Sum(norms, activation).to(dtype)
    for norm in own.norms:
        for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            if tensor.is_floating_point():
                (nn.init.uniform_ if name in ("weight", "running_var") else nn.init.normal_)(tensor)
                tensor.data += 0.5 * (name in ("weight", "running_var"))
    plain = copy.deepcopy(own)
    plain.own = False
    return own, plain


def images(*shape, dtype=torch.float64):
    return torch.randn(shape or (3, CHANNELS, 6, 7), dtype=dtype, requires_grad=True)


def check_steps(own, plain, same, steps=3, memory_format=torch.contiguous_format):
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (own, plain)]
    for step in range(steps):
        x = images().detach().contiguous(memory_format=memory_format)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [m(i) for m, i in zip((own, plain), inputs, strict=True)]
        weights = torch.randn_like(outputs[1])
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            (output * weights).sum().backward()
        same(outputs[0], outputs[1], ROUNDING, f"output of step {step}")
        same(inputs[0].grad, inputs[1].grad, ROUNDING, f"gradient of the input in step {step}")
        # A norm makes the gradient of what it normalizes a difference of larger terms: bounded by the largest of all.
        largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
        for (name, p), q in zip(own.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                assert (p.grad - q.grad).abs().max() <= ROUNDING * largest, f"gradient of {name} in step {step}"
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), b in zip(own.named_buffers(), plain.buffers(), strict=True):
        assert a.dtype == b.dtype
        same(a.double(), b.double(), ROUNDING, name)


def frozen(norm):
    return norm.eval()


NORMS = {
    "batch": lambda: nn.BatchNorm2d(CHANNELS),
    "frozen": lambda: frozen(nn.BatchNorm2d(CHANNELS)),
    "none": lambda: None,
    "cumulative": lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
    "momentum, eps": lambda: nn.BatchNorm2d(CHANNELS, eps=1e-2, momentum=0.3),
    "untracked": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "untracked, eval": lambda: frozen(nn.BatchNorm2d(CHANNELS, track_running_stats=False)),
    "plain": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "plain, frozen": lambda: frozen(nn.BatchNorm2d(CHANNELS, affine=False)),
    "sync, one process": lambda: nn.SyncBatchNorm(CHANNELS).eval(),
    "group": lambda: nn.GroupNorm(1, CHANNELS),
}


MIXED = (
    ("batch", "frozen", "none"),
    ("none", "batch", "plain, frozen"),
    ("frozen", "cumulative", "momentum, eps"),
    ("momentum, eps", "plain", "batch"),
    ("untracked", "batch", "untracked, eval"),
    ("batch", "group", "none"),
    ("sync, one process", "batch", "cumulative"),
)


@pytest.mark.parametrize("kinds", [*((kind,) * 3 for kind in NORMS), *MIXED], ids=" + ".join)
def test_steps_are_torchs(kinds, same):
    own, plain = pair([NORMS[kind]() for kind in kinds], nn.ReLU())
    check_steps(own, plain, same)


@pytest.mark.parametrize(
    "activation",
    [None, nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.PReLU(CHANNELS)],
    ids=lambda a: type(a).__name__,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_activations(activation, memory_format, same):
    own, plain = pair([nn.BatchNorm2d(CHANNELS) for _ in range(3)], activation)
    check_steps(own, plain, same, steps=2, memory_format=memory_format)


def test_frozen_parameters_and_inputs_get_no_gradient(same):
    own, plain = pair([nn.BatchNorm2d(CHANNELS) for _ in range(3)], nn.ReLU())
    for m in (own, plain):
        m.pointwise.requires_grad_(False)
        m.norms[2].requires_grad_(False)
        m.norms[0].bias.requires_grad_(False)
    check_steps(own, plain, same, steps=1)
    x = images().detach()
    own.zero_grad()
    plain.zero_grad()
    own(x).square().sum().backward()
    plain(x).square().sum().backward()
    same(own.dense.weight.grad, plain.dense.weight.grad, 1e-10, "weight gradient of a constant input")


@pytest.mark.parametrize("small", [0, 1 << 18])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(training, small, same, monkeypatch):
    monkeypatch.setattr(branch_sum, "_WORTH_A_CALL", small)
    own, plain = pair([nn.BatchNorm2d(CHANNELS) for _ in range(3)], nn.ReLU())
    own.train(training)
    plain.train(training)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = images()
            same(own(x), plain(x), ROUNDING)
    same(own.norms[1].running_var, plain.norms[1].running_var, ROUNDING, "running variance")


# --- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "module"])
def test_half_is_no_further_from_the_truth_than_torch(dtype, how):
    own, plain = pair([nn.BatchNorm2d(CHANNELS) for _ in range(3)], nn.ReLU())
    truth = copy.deepcopy(plain)
    x = images(16, CHANNELS, 12, 12).detach().to(dtype).double()
    wanted = truth(x)
    wanted.square().mean().backward()
    errors = []
    for m in (own, plain):
        m.to(torch.float32 if how == "autocast" else dtype)
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            out = m(x.to(dtype))
        assert out.dtype == dtype
        out.float().square().mean().backward()
        assert m.norms[0].running_mean.dtype == m.norms[0].weight.dtype
        parts = [out, m.norms[0].running_mean, *(p.grad for p in m.parameters())]
        exact = [wanted, truth.norms[0].running_mean, *(p.grad for p in truth.parameters())]
        relative = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(parts, exact, strict=True)]
        errors.append(torch.stack(relative))
    assert (errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps).all(), f"ours {errors[0]}, torch {errors[1]}"


# --- what torch's modules do that the op does not know about


@pytest.mark.parametrize("place", ["norms.1", "activation"])
def test_hooks_run(place, same):
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        own, plain = pair([nn.BatchNorm2d(CHANNELS) for _ in range(3)], nn.ReLU())
        calls = []
        for m in (own, plain):
            getattr(m.get_submodule(place), register)(lambda *_, seen=calls: seen.append(place))
        check_steps(own, plain, same, steps=1)
        assert len(calls) == 2, register


def test_a_norm_of_ones_own_is_called(same):
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    own, plain = pair([Doubled(CHANNELS), nn.BatchNorm2d(CHANNELS), None], nn.ReLU())
    check_steps(own, plain, same, steps=2)


@pytest.mark.parametrize("kind", ["batch", "frozen", "plain", "none", "no bias"])
def test_a_gain_multiplies_a_whole_term(kind, same):
    norm = nn.BatchNorm2d(CHANNELS) if kind == "no bias" else NORMS[kind]()
    if kind == "no bias":
        norm.bias = None
    own = Sum([norm, nn.BatchNorm2d(CHANNELS), None]).double()
    gain = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = images()
    branches = [Branch(norm, own.dense, gain=gain), Branch(own.norms[1], own.pointwise)]
    out = branch_norm_sum(x, branches, nn.ReLU())
    y = own.dense(x)
    wanted = torch.relu(gain * (y if norm is None else norm(y)) + own.norms[1](own.pointwise(x)))
    same(out, wanted, ROUNDING)
    leaves = [x, gain, own.dense.weight, own.norms[1].weight]
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (out, wanted)), strict=True):
        same(a, b, 1e-11, "gradient")


def test_one_norm_in_two_branches(same):
    norm = nn.BatchNorm2d(CHANNELS)
    own, plain = pair([norm, norm, None])
    check_steps(own, plain, same, steps=2)


@pytest.mark.parametrize(
    ("shape", "error"),
    [((CHANNELS, 6, 7), "expected 4D input"), ((1, CHANNELS, 1, 1), "more than 1 value per channel")],
)
def test_errors_are_torchs(shape, error):
    own, _ = pair([nn.BatchNorm2d(CHANNELS) for _ in range(3)])
    with pytest.raises(ValueError, match=error):
        own(images(*shape))


def test_wrong_arguments():
    x = images()
    with pytest.raises(ValueError, match="at least one branch"):
        branch_norm_sum(x, [])
    with pytest.raises(ValueError, match="none, cheap, got 'all'"):
        branch_norm_sum(x, [Branch(None)], recompute="all")
    with pytest.raises(TypeError, match="got GroupNorm"):
        norm_scale_shift(x, nn.GroupNorm(1, CHANNELS))


def test_empty_batches(same):
    own, plain = pair([nn.BatchNorm2d(CHANNELS) for _ in range(3)], nn.ReLU())
    own.eval()
    assert own(images(0, CHANNELS, 6, 7)).shape == plain.eval()(images(0, CHANNELS, 6, 7)).shape


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own jvp
def test_function_transforms(same):
    own, plain = pair([frozen(nn.BatchNorm2d(CHANNELS)) for _ in range(3)], nn.ReLU())
    x = images(4, 3, CHANNELS, 6, 7).detach()
    same(torch.func.vmap(own)(x), torch.func.vmap(plain)(x), ROUNDING, "vmap")
    gradients = [torch.func.grad(lambda i, m=m: m(i).square().sum())(x[0]) for m in (own, plain)]
    same(*gradients, ROUNDING, "grad")
    tangents = [torch.func.jvp(m, (x[0],), (x[1],))[1] for m in (own, plain)]
    same(*tangents, ROUNDING, "jvp")


def test_second_derivatives(same):
    own, plain = pair([nn.BatchNorm2d(CHANNELS), frozen(nn.BatchNorm2d(CHANNELS)), None], nn.SiLU())
    second = []
    x = images(2, CHANNELS, 3, 4)
    for m in (own, plain):
        (first,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), [x, m.dense.weight]))
    for a, b in zip(*second, strict=True):
        same(a, b, 1e-10, "second derivative")


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training, same):
    norms = [nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS, eps=0.1, momentum=0.3), nn.BatchNorm2d(CHANNELS)]
    own, plain = pair(norms, nn.ReLU())
    own.train(training)
    plain.train(training)
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    x, y = images(), images()
    y.data.copy_(x)
    out, wanted = compiled(x), plain(y)
    same(out, wanted, ROUNDING)
    (out.square().sum() + wanted.square().sum()).backward()
    same(x.grad, y.grad, ROUNDING, "gradient")
    for (name, a), b in zip(own.named_buffers(), plain.buffers(), strict=True):
        same(a.double(), b.double(), ROUNDING, name)


@pytest.mark.parametrize("training", [True, False])
def test_exports_to_torchs_own_ops(training, same):
    own, _ = pair([nn.BatchNorm2d(CHANNELS) for _ in range(3)], nn.ReLU())
    own.train(training)
    x = images().detach()
    exported = torch.export.export(copy.deepcopy(own), (x,))
    assert "repkern" not in str(exported.graph)
    same(exported.module()(x), own(x), ROUNDING)


def test_pickles_after_use(same):
    own, _ = pair([nn.BatchNorm2d(CHANNELS) for _ in range(3)], nn.ReLU())
    x = images()
    own(x).sum().backward()
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        same(twin.eval()(x), own.eval()(x), 0.0)


@pytest.mark.parametrize("channels", [2, 3, 15, 16])
def test_strided_pointwise_maps_of_few_channels(channels, same):
    """Where torch's own convolution writes past a buffer in its backward, with channels_last."""
    conv = nn.Conv2d(channels, 5, 1, (2, 3), bias=False).double()
    x = images(2, channels, 9, 7)
    y = pointwise_map(conv, x)
    wanted = torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], x[:, :, ::2, ::3])
    same(y, wanted, ROUNDING)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), [x, conv.weight]) for o in (y, wanted)), strict=True):
        same(a, b, ROUNDING, "gradient")
    assert pointwise_map(conv, x[0]).shape == y.shape[1:]


def test_training_in_channels_last_does_not_crash():
    stem = RepVGGBlock(3, 8, 3, 2).to(memory_format=torch.channels_last)
    for _ in range(4):
        stem(torch.randn(16, 3, 128, 128).contiguous(memory_format=torch.channels_last)).sum().backward()


# --- norm_scale_shift


def folded(y, weight, norm):
    """conv(norm(y)) with the border at norm(0), as the blocks compute it."""
    scale, shift = norm_scale_shift(y, norm)
    out = functional.conv2d(y, weight * scale[:, None, None], padding=1)
    return out + (weight * shift[:, None, None]).sum((1, 2, 3))[:, None, None]


def on_maps(y, weight, norm):
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
    if not norm.training and norm.running_mean is not None:
        mean, var = norm.running_mean, norm.running_var
    value = -mean * torch.rsqrt(var + norm.eps)
    value = value if norm.weight is None else value * norm.weight
    value = value if norm.bias is None else value + norm.bias
    map_ = norm(y) - value[:, None, None]
    return functional.conv2d(functional.pad(map_, (1, 1, 1, 1)) + value[:, None, None], weight)


@pytest.mark.parametrize("kind", [kind for kind in NORMS if kind not in ("none", "group")])
def test_scale_and_shift(kind, same):
    norm = NORMS[kind]().double()
    twin = copy.deepcopy(norm)
    y, z = images(), images()
    z.data.copy_(y)
    weight = torch.randn(4, CHANNELS, 3, 3, dtype=torch.float64)
    for _ in range(2):
        out, wanted = folded(y, weight, norm), on_maps(z, weight, twin)
        same(out, wanted, 1e-12, "output")
    ((out + out.square()).sum() + (wanted + wanted.square()).sum()).backward()
    same(y.grad, z.grad, 1e-11, "gradient of the map")
    for (name, p), q in zip(norm.named_parameters(), twin.parameters(), strict=True):
        same(p.grad, q.grad, 1e-11, name)
    for (name, a), b in zip(norm.named_buffers(), twin.buffers(), strict=True):
        same(a.double(), b.double(), ROUNDING, name)


def test_scale_and_shift_of_a_norm_with_hooks():
    norm, calls = nn.BatchNorm2d(CHANNELS), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    y = torch.randn(3, CHANNELS, 4, 4)
    scale, shift = norm_scale_shift(y, norm)
    assert calls == [1]
    assert int(norm.num_batches_tracked) == 1
    twin = nn.BatchNorm2d(CHANNELS)
    torch.testing.assert_close(scale[:, None, None] * y + shift[:, None, None], twin(y))


def test_scale_and_shift_of_half_maps_are_float32():
    scale, shift = norm_scale_shift(torch.randn(3, CHANNELS, 4, 4).bfloat16(), nn.BatchNorm2d(CHANNELS))
    assert (scale.dtype, shift.dtype) == (torch.float32, torch.float32)
    with pytest.raises(ValueError, match="more than 1 value"):
        norm_scale_shift(torch.randn(1, CHANNELS, 1, 1), nn.BatchNorm2d(CHANNELS))
