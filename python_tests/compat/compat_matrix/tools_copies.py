"""Copies, files and averages."""

import copy
import io
import pickle

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compat_matrix.table import tool
from compat_matrix.values import close, folds, plain_of, step, trains
from repkern.nn import OREPAConv2d, group_squeeze

COPIES = "Copies, files and averages"


@tool("deepcopy in a hook", COPIES)
def copied_in_hook(case):
    """`copy.deepcopy(model)` in a forward hook of the block and of its activation, also while the squeezes of a network
    are grouped: the copy computes the same and trains."""
    for group in (False, True):
        model, x = nn.Sequential(case.make()).train(), case.images()
        if group and any(isinstance(module, OREPAConv2d) for module in model.modules()):
            group_squeeze(model)
        wanted, copied = copied_while_training(model, x)
        close(copied.eval()(x), wanted, "copy")
        close(plain_of(copied)(x), wanted, "copy, deployed")
        trains(copied, x)


def copied_while_training(model, x):
    """(output in eval mode afterwards, the last copy that a hook made in a training step)."""
    copies, handles = [], []

    def copying(*_):
        copies.append(copy.deepcopy(model))

    hooked = [model[0], *(module for module in model[0].modules() if not list(module.children()))]
    for module in hooked:
        handles.append(module.register_forward_hook(copying))
    model(x).square().sum().backward()
    for module in copies[-1][0].modules():
        module._forward_hooks.clear()  # those that copy
    for handle in handles:
        handle.remove()
    return model.eval()(x).detach(), copies[-1]


@tool("EMA", COPIES)
def averaged(case):
    """`swa_utils.AveragedModel` with an exponential average over three steps: parameters are the average, and the
    averaged block's deployed form is its own."""
    block, x = case.make(), case.images()
    average = AveragedModel(block, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    average.update_parameters(block)
    expected = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    for _ in range(3):
        step(block, x)
        average.update_parameters(block)
        for name, parameter in block.named_parameters():
            expected[name] = 0.8 * expected[name] + 0.2 * parameter.detach()
    for name, parameter in average.module.named_parameters():
        close(parameter.detach(), expected[name], name)
    folds(average.module, x)
    folds(block, x)


@tool("pickle and `torch.save` of a module", COPIES)
def pickled(case):
    """Also in the middle of training: the loaded block computes the same and trains on."""
    block, x = case.make(), case.images()
    step(block, x)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(block)), torch.load(buffer, weights_only=False)):
        close(folds(other, x), block(x), "loaded")
        trains(other, x)


@tool("state_dict", COPIES)
def state_dict(case):
    """`torch.save` of the state_dict, `torch.load(weights_only=True)` and strict loading into a fresh block; also
    `assign=True`: the same output, and it trains."""
    block, x = case.make(), case.images()
    step(block, x)
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    for assign in (False, True):
        buffer.seek(0)
        other = case.construct().double().eval()
        other.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
        close(folds(other, x), block(x), "loaded")
        trains(other, x)


@tool("meta device and `to_empty`", COPIES)
def from_meta(case):
    """A block made on the meta device, moved by `to_empty`, then given a state_dict: the same output."""
    block, x = case.make(), case.images()
    with torch.device("cpu" if case.name.startswith("nested") else "meta"):  # growing a branch looks at values
        other = case.construct().double().eval().to("meta")
    other.to_empty(device="cpu")
    for module in other.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    other.load_state_dict(block.state_dict())
    close(folds(other, x), block(x), "moved")
