"""recompute="cheap": bitwise the gradients of keeping the maps, with the maps gone between forward and backward."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from repkern.nn import DiverseBranchBlock, DyRepBlock, MobileOneBlock, RepVGGBlock, branch_sum
from repkern.nn import recompute as recompute_module
from repkern.nn.branch_sum import Branch, branch_norm_sum, norm_scale_shift

CHANNELS = 4


class Block(nn.Module):
    """Four branches: 3x3, 1x1, 1x1 - norm - average - activation, and a sum of normed branches of its own."""

    def __init__(self, recompute="none", inner=nn.BatchNorm2d):
        super().__init__()
        self.dense = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.pointwise = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.avg = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.nested = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in range(5))
        self.inner = nn.ModuleList(inner(CHANNELS) for _ in range(3))
        self.recompute = recompute
        self.maps, self.calls = [], 0

    def _pointwise(self, x):
        self.calls += 1
        return self._watched(self.pointwise(x))

    def _average(self, x):
        y = self._watched(self.avg(x))
        scale, shift = norm_scale_shift(y, self.inner[0])
        weight = (scale / 9)[:, None, None, None].expand(-1, 1, 3, 3).to(y.dtype)
        pooled = self._watched(functional.conv2d(y, weight, padding=1, groups=CHANNELS))
        return self._watched(torch.tanh(pooled + shift[:, None, None].to(y.dtype)))

    def _nested(self, x):
        return self._watched(
            branch_norm_sum(
                x, [Branch(self.inner[1], self.nested, cheap=True), Branch(self.inner[2])], nn.SiLU(),
                recompute=self.recompute,
            )
        )  # fmt: skip

    def _watched(self, y):
        self.maps.append(StorageWeakRef(y.untyped_storage()))
        return y

    def forward(self, x):
        branches = [
            Branch(self.norms[0], self.dense),
            Branch(self.norms[1], self._pointwise, cheap=True),
            Branch(self.norms[2], self._average, cheap=True),
            Branch(self.norms[3], self._nested, cheap=True),
            Branch(self.norms[4]),
        ]
        return branch_norm_sum(x, branches, nn.ReLU(), recompute=self.recompute)


class Net(nn.Sequential):
    """Two of them."""

    def __init__(self, recompute="none", **options):
        super().__init__(Block(recompute, **options), Block(recompute, **options))


def twins(dtype=torch.float32, **options):
    kept = Net(**options).to(dtype)
    for parameter in kept.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    cheap = copy.deepcopy(kept)
    for block in cheap:
        block.recompute = "cheap"
    return kept, cheap


def images(dtype=torch.float32):
    return torch.randn(3, CHANNELS, 6, 5, dtype=dtype)


def equal(kept, cheap):
    for (name, a), b in zip(kept.named_parameters(), cheap.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), f"gradient of {name}"
    for (name, a), b in zip(kept.named_buffers(), cheap.buffers(), strict=True):
        assert torch.equal(a, b), name


def steps(nets, count=3, autocast=None, x_grad=True, before_backward=lambda net: None):
    optimizers = [torch.optim.SGD(net.parameters(), 0.01, momentum=0.9) for net in nets]
    for _ in range(count):
        x = images(torch.float32 if autocast else next(nets[0].parameters()).dtype)
        inputs = [x.clone().requires_grad_(x_grad) for _ in nets]
        outputs = []
        for net, own, optimizer in zip(nets, inputs, optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                outputs.append(net(own))
            before_backward(net)
            outputs[-1].float().square().mean().backward()
        assert torch.equal(*outputs)
        assert not x_grad or torch.equal(*(own.grad for own in inputs))
        equal(*nets)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bitwise_the_same_steps(dtype):
    steps(twins(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_replay_runs_under_the_forwards_autocast(dtype):
    steps(twins(), autocast=dtype)


def test_constant_input_and_frozen_parameters():
    nets = twins()
    for net in nets:
        net[1].pointwise.requires_grad_(False)
        net[1].avg.requires_grad_(False)
        net[0].norms[1].requires_grad_(False)
    steps(nets, x_grad=False)


def test_frozen_statistics_of_the_forward_are_used_again():
    nets = twins()
    for net in nets:
        for norm in (*net[0].inner, net[0].norms[1], *net[1].norms):
            norm.eval()

    def train(net):
        net.train()

    steps(nets, count=1, before_backward=train)


@pytest.mark.unguarded  # the guards keep every output until the test ends
@pytest.mark.parametrize("training", [True, False])
def test_cheap_maps_do_not_live_until_the_backward(training):
    def alive(net):
        return [not storage.expired() for block in net for storage in block.maps]

    kept, cheap = (net.train(training) for net in twins())
    gc.disable()  # a cycle would keep them, too
    try:
        out = kept(images()), cheap(images())
        # Nothing saves what tanh gets, only what it gives.
        assert alive(kept) == [True, True, False, True, True] * 2
        assert alive(cheap) == [False] * 10
        out[1].sum().backward()
        assert alive(cheap) == [False] * 20
        del out
        assert alive(kept) == [False] * 10
    finally:
        gc.enable()


def test_one_replay_serves_all_who_need_the_maps():
    _, net = twins()
    x = images()
    out = net(x)
    assert [block.calls for block in net] == [1, 1]
    out.sum().backward(retain_graph=True)
    assert [block.calls for block in net] == [2, 2]
    first = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    out.sum().backward()
    assert [block.calls for block in net] == [3, 3]
    assert all(torch.equal(a, p.grad) for a, p in zip(first, net.parameters(), strict=True))


def test_nothing_is_made_again_without_a_backward():
    _, net = twins()
    with torch.no_grad():
        net(images())
    with torch.inference_mode():
        net(images())
    assert [block.calls for block in net] == [2, 2]


def test_several_forwards_before_the_backward_and_accumulation():
    nets = twins()
    batches = [images() for _ in range(3)]
    for net in nets:
        sum(net(x).square().mean() for x in batches).backward()
        net(batches[0]).mean().backward()
    equal(*nets)


def test_gradients_asked_for_by_name():
    for net in (twins := globals()["twins"]()):
        net.eval()
    x = images().requires_grad_()
    wanted = [torch.autograd.grad(net(x).sum(), [x, net[0].avg.weight]) for net in twins]
    assert all(torch.equal(a, b) for a, b in zip(*wanted, strict=True))


def test_second_derivatives():
    second = []
    x = images(torch.float64).requires_grad_()
    for net in twins(torch.float64):
        (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), [x, *net.parameters()]))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(a.abs().max()))


def test_a_changed_input_is_detected():
    _, net = twins()
    x = images()
    out = net(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["pointwise", "avg", "nested", "inner.0", "dense"])
def test_a_changed_parameter_is_detected(name):
    _, net = twins()
    out = net(images().requires_grad_())
    with torch.no_grad():
        net[0].get_submodule(name).weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_branch_that_is_another_function_the_second_time():
    norm, flag = nn.BatchNorm2d(CHANNELS), [torch.tanh, torch.square, torch.tanh]

    def fickle(x):
        return flag.pop()(torch.tanh(x)) if len(flag) > 2 else torch.tanh(x) + 0

    out = branch_norm_sum(images().requires_grad_(), [Branch(norm, fickle, cheap=True)], recompute="cheap")
    with pytest.raises(RuntimeError, match="same function of its input"):
        out.sum().backward()


def test_a_norm_of_ones_own_is_not_called_twice():
    class Counting(nn.BatchNorm2d):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            return super().forward(x)

    nets = twins(inner=Counting)
    Counting.calls = 0
    steps(nets, count=2)
    assert Counting.calls == 2 * 2 * 2 * 3  # steps, networks, blocks, norms


def test_hooks_of_parameters_and_modules_run_once():
    _, net = twins()
    seen = []
    net[0].pointwise.weight.register_hook(lambda grad: seen.append("tensor"))
    net[0].pointwise.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    net(images()).sum().backward()
    assert sorted(seen) == ["accumulated", "tensor"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_checkpointing_that_decides(reentrant, monkeypatch):
    # Reentrant checkpointing runs the forward without gradients, where torch's modules would round differently.
    monkeypatch.setattr(branch_sum, "_WORTH_A_CALL", 0)
    kept, cheap = twins()
    kept.eval()  # checkpointing updates running statistics twice
    cheap.eval()
    x = images().requires_grad_()
    kept(x).square().sum().backward()
    checkpoint(cheap, x, use_reentrant=reentrant).square().sum().backward()
    equal(kept, cheap)


def test_compiled_it_is_the_plain_path(same):
    kept, cheap = twins(torch.float64)
    x = images(torch.float64)
    kept(x).square().sum().backward()
    for block in cheap:
        block._watched = lambda y: y
    compiled = torch.compile(cheap, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    for (name, a), b in zip(kept.named_parameters(), cheap.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_a_used_block_copies():
    _, net = twins()
    net(images()).sum().backward()
    for block in net:
        block.maps = []
    assert copy.deepcopy(net)(images()).requires_grad
    assert recompute_module.current_tape() is None


@pytest.mark.parametrize("kind", [RepVGGBlock, DiverseBranchBlock, DyRepBlock, MobileOneBlock])
def test_a_replay_uses_the_parameters_of_its_forward(kind):
    """torch.func.functional_call has put the module's own ones back by the time of the backward."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    gradients = {}
    for recompute in ("none", "cheap"):
        torch.manual_seed(1)
        block, other = (kind(4, 4, 3, recompute=recompute, dtype=torch.float64) for _ in range(2))
        given = dict(other.named_parameters())
        functional_call(block, given, (x,)).square().sum().backward()
        gradients[recompute] = {name: p.grad for name, p in given.items()}
        assert all(p.grad is None for p in block.parameters())
    for name, expected in gradients["none"].items():
        assert torch.equal(gradients["cheap"][name], expected), name
