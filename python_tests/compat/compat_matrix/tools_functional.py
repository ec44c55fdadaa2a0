"""torch.func, checkpointing and mixed precision."""

import copy

import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from compat_matrix.table import tool
from compat_matrix.values import EQUAL, close, folds, same_gradients, trains

FUNCTIONAL = "torch.func, checkpointing, mixed precision"


def state_of(block):
    return dict(block.named_parameters()), dict(block.named_buffers())


@tool("`functional_call`", FUNCTIONAL)
def called_with_state(case):
    """With the state of another block: its output and its gradients."""
    block, other, x = case.make(), case.make(), case.images()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    out = functional_call(block, state_of(other), (x,))
    close(out, other(x), "output")
    out.square().sum().backward()
    changed = copy.deepcopy(other)
    changed.zero_grad()
    changed(x).square().sum().backward()
    same_gradients(other, changed, "gradients")
    folds(block, x)


@tool("per-sample gradients", FUNCTIONAL)
def per_sample(case):
    """`vmap(grad(functional_call))` over the samples of a batch, against a backward for every sample alone."""
    block, x = case.make(), case.images()
    parameters, buffers = state_of(block)
    trained = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
    fixed = {name: p.detach() for name, p in parameters.items() if not p.requires_grad} | buffers

    def loss(params, sample):
        return functional_call(block, ({**params, **fixed},), (sample[None],)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(trained, x)
    for at in range(len(x)):
        alone = copy.deepcopy(block)
        alone(x[at : at + 1]).square().sum().backward()
        named = dict(alone.named_parameters())
        largest = max(float(named[name].grad.abs().max()) for name in trained)
        for name, gradients in together.items():
            difference = float((gradients[at] - named[name].grad).abs().max())
            assert difference <= EQUAL * largest, f"{name} of sample {at}: off by {difference:.3g} of {largest:.3g}"


@tool("ensembles of stacked states", FUNCTIONAL)
def stacked(case):
    """`stack_module_state` and `vmap` over the states of three blocks: the output of each."""
    blocks, x = [case.make() for _ in range(3)], case.images()
    with torch.no_grad():
        for at, block in enumerate(blocks):
            for parameter in block.parameters():
                parameter.mul_(1 + 0.1 * at)
    parameters, buffers = stack_module_state(blocks)
    skeleton = copy.deepcopy(blocks[0]).to("meta")
    outputs = vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(parameters, buffers)
    for at, block in enumerate(blocks):
        close(outputs[at], folds(block, x), f"block {at}")


@tool("gradient checkpointing", FUNCTIONAL)
def checkpointed(case):
    """`torch.utils.checkpoint`, both kinds: the gradients without it."""
    for reentrant in (True, False):
        block, other = case.make(), case.make()
        x = case.images().requires_grad_()
        checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
        other(x).square().sum().backward()
        same_gradients(block, other, "checkpointed")


@tool("autocast", FUNCTIONAL)
def autocast(case):
    """bfloat16 on the CPU, forward and backward, in float32 parameters: within a few roundings of bfloat16 of float64,
    gradients in float32; afterwards the block is what it was."""
    exact, x = case.make(), case.images()
    block = copy.deepcopy(exact).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x.float())
    close(out.double(), exact(x), "autocast", 64 * torch.finfo(torch.bfloat16).eps)
    out.float().square().mean().backward()
    for name, parameter in block.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype is torch.float32, name
            assert torch.isfinite(parameter.grad).all(), name
    folds(block.double(), x)


@tool("half precision", FUNCTIONAL)
def half(case):
    """`.to(torch.bfloat16)`: output and gradients in that dtype, the deployed form within its roundings."""
    exact, x = case.make(), case.images()
    block = copy.deepcopy(exact).to(torch.bfloat16)
    out = block(x.bfloat16())
    assert out.dtype is torch.bfloat16
    close(out.double(), exact(x), "bfloat16", 64 * torch.finfo(torch.bfloat16).eps)
    trains(copy.deepcopy(exact), x)


@tool("channels_last", FUNCTIONAL)
def channels_last(case):
    """`.to(memory_format=torch.channels_last)`: the same output, in that format where it has one, and training."""
    block, x = case.make(), case.images()
    wanted = block(x)
    block = block.to(memory_format=torch.channels_last)
    out = block(x.contiguous(memory_format=torch.channels_last))
    close(out, wanted, "output")
    trains(block, x)
    folds(block, x)
