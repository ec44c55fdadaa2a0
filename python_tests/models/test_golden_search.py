"""What the released searches compute with blocks: DyRep's growing and cutting, RepNAS's gates."""

import pytest
import torch

from repkern import load_checkpoint
from repkern.nn.dyrep import DyRepBlock
from repkern.nn.odb import ODBBlock
from repkern.nn.seven_branches import SEVEN_BRANCHES
from repkern.testing import assert_close

FLOAT64 = {"dtype": torch.float64}
AVERAGE_TOLERANCE = 1e-7  # the released conversion makes its average kernel in float32
# The released candidates in their order; all but these, the identity, have a gate.
REPNAS_ORDER = ("1x1", "1x1_avg", "kxk", "1x1_kxk", "1xk", "kx1")


# --- DyRep: a convolution grows into a block, and part of the block is cut


def loaded(state, branches=None):
    """A model of one convolution, which load_checkpoint makes a block of."""
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1, bias=False, **FLOAT64)).eval()
    load_checkpoint({f"0.{name}": t for name, t in state.items()}, model)
    assert isinstance(model[0], DyRepBlock)
    if branches is not None:
        assert model[0].branches == branches
    return model


@pytest.fixture
def transition(golden):
    return golden.read("dyrep_transition", "grow_then_cut_8_8")


def test_dyrep_states_along_the_way(golden, transition):
    kept = tuple(name for name, flag in zip(SEVEN_BRANCHES, transition["config"]["cut"], strict=True) if flag)
    for name, output, branches in (
        ("state_after_grow", "output_after_grow", SEVEN_BRANCHES),
        ("state_before_cut", "output_before_cut", SEVEN_BRANCHES),
        ("state_after_cut", "output_after_cut", kept),
    ):
        golden.check(loaded(transition[name], branches)(transition["input"]), transition[output], output)
    kernel, bias = loaded(transition["state_before_cut"])[0].equivalent_kernel_bias()
    assert_close(kernel, transition["kernel_bias_before_cut"][0], AVERAGE_TOLERANCE, "kernel before the cut")
    assert_close(bias, transition["kernel_bias_before_cut"][1], AVERAGE_TOLERANCE, "bias before the cut")


def test_growing_is_exact_where_the_released_code_is_not(golden, transition):
    """With the released random branches; the released kxk kernel is ours but for the eps of its norm, 5e-6."""
    block = loaded(transition["state_after_grow"])[0]
    released = block.dense.weight.clone()
    block.set_equivalent_kernel_bias(transition["conv_weight"], None)
    golden.check(block(transition["input"]), transition["output_conv"], "output after growing")
    difference = (transition["output_after_grow"] - transition["output_conv"]).abs().max()
    assert difference > 1e-6
    assert_close(block.dense.weight, released, 1e-5 * float(released.detach().abs().max()), "kxk kernel")


def test_calibrated_statistics(golden, transition):
    """Cumulative statistics of the new norms over the calibration batches."""
    state = {name: t.clone() for name, t in transition["state_after_grow"].items()}
    for name, t in state.items():
        if name.endswith("running_mean"):
            t.zero_()
        elif name.endswith("running_var"):
            t.fill_(1)
        elif name.endswith("num_batches_tracked"):
            t.zero_()
    block = DyRepBlock(8, 8, 3, border="released", **FLOAT64).train()
    load_checkpoint(state, block)
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    for batch in transition["calibration_batches"]:
        block(batch)
    ours, expected = block.state_dict(), golden.converted(transition["state_after_grow"])
    names = [name for name in expected if "running" in name and not name.startswith("dense_bn")]
    assert len(names) == 16
    for name in names:
        golden.check(ours[name], expected[name], name, at_least=1.0)


def test_cutting_keeps_the_output(golden, transition):
    model = loaded(transition["state_before_cut"])
    cut = [name for name, flag in zip(SEVEN_BRANCHES, transition["config"]["cut"], strict=True) if not flag]
    model[0].remove_branches(cut)
    output = model(transition["input"])
    golden.check(output, transition["output_before_cut"], "output after cutting")
    assert_close(output, transition["output_after_cut"], 1.001 * transition["max_diff_cut"], "released cut")


# --- RepNAS: gates


def repnas(golden, case):
    fixture = golden.read("repnas_mixedop", case)
    stride = 2 if case.startswith("s2") else 1
    options = {"strided_reduce": False, "border": "released", "activation": torch.nn.ReLU(), **FLOAT64}
    return fixture, ODBBlock(8, 8, 3, stride, **options).eval()


CASES = ("s1_8_8", "s1_8_8_all", "s2_8_8")


@pytest.mark.parametrize("case", CASES)
def test_gated_output_and_gradients(golden, case):
    fixture, block = repnas(golden, case)
    ours = [REPNAS_ORDER.index(name) for name in block.gated_branches]
    alpha = fixture["alpha"].clone().requires_grad_()
    rank = torch.sigmoid(alpha + fixture["noise"])
    gates = (fixture["mask"] + rank - rank.detach())[ours]
    mask = [bool(fixture["mask"][at]) for at in ours]
    learned = list(fixture["grad_of_params"])

    def loss(output):
        value = output.square().mean()
        value.backward(retain_graph=True, inputs=[alpha])
        return value

    output, grad_input, gradients, _ = golden.step(
        block, fixture["input"], fixture["state_dict"], learned, gates, mask, loss=loss
    )
    golden.check(output, fixture["output_eval"], "gated output")
    golden.check(alpha.grad, fixture["grad_alpha"], "gradient of alpha")
    golden.check_gradients(fixture, grad_input, gradients, "eval")


@pytest.mark.parametrize("case", CASES)
def test_chosen_branches_deployed(golden, case):
    fixture, block = repnas(golden, case)
    load_checkpoint(fixture["state_dict"], block)
    chosen = [name for name, flag in zip(REPNAS_ORDER, fixture["mask"], strict=True) if flag]
    block.keep_branches([*chosen, *(["id"] if "id" in block.branches else [])])
    golden.check(block(fixture["input"]), fixture["output_eval"], "output of the chosen branches")
    golden.check(block.fuse()(fixture["input"]), fixture["output_eval"], "deployed output")
    if "deployed_weight" in fixture:
        weight, bias = block.equivalent_kernel_bias()
        assert_close(weight, fixture["deployed_weight"], AVERAGE_TOLERANCE, "deployed weight")
        assert_close(bias, fixture["deployed_bias"], AVERAGE_TOLERANCE, "deployed bias")
