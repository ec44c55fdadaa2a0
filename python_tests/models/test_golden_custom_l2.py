"""The custom L2 of a released RepVGG block: value and gradients."""

import torch
from torch import nn

from repkern import load_checkpoint
from repkern.nn import RepVGGBlock, custom_l2


def test_value_and_gradients(golden):
    state = golden.read("repvgg", "s1_16_16_identity")["state_dict"]
    block = load_checkpoint(state, RepVGGBlock(16, 16, 3, activation=nn.ReLU(), dtype=torch.float64))
    wanted = golden.read("repvgg", "custom_L2_s1_16_16")
    value = custom_l2(block)
    golden.check(value, torch.as_tensor(wanted["value"], dtype=torch.float64), "custom L2")
    value.backward()
    ours = {"rbr_dense.conv": block.dense, "rbr_1x1.conv": block.pointwise}
    for name, conv in ours.items():
        golden.check(conv.weight.grad, wanted["grad_of_params"][f"{name}.weight"], f"gradient of {name}")
    others = {name for name, gradient in wanted["grad_of_params"].items() if gradient is None}
    assert others == set(wanted["grad_of_params"]) - {f"{name}.weight" for name in ours}
    for norm in (block.dense_bn, block.pointwise_bn, block.identity_bn):
        assert norm.weight.grad is None
        assert norm.bias.grad is None
