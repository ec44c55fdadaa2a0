"""Our blocks against the released OREPA blocks, through the importer: outputs, statistics, gradients, kernels."""

import pytest
import torch
from torch.func import functional_call

from repkern import load_checkpoint, reparameterize
from repkern.models.checkpoints.orepa import convert_orepa
from repkern.nn import OREPABlock, OREPADeepStem, OREPARepVGGBlock

GOLDEN_BLOCKS = ("orepa3x3", "orepa1x1", "orepa_deepstem", "orepa_repvgg")


def make(block, config):
    arguments = {"kernel_size": 1, "dtype": torch.float64, **config["kwargs"]}
    if block == "orepa_deepstem":
        plain = "base" in config["case"]
        return OREPADeepStem(**arguments, factors="plain" if plain else "orepa")
    if block == "orepa_repvgg":
        return OREPARepVGGBlock(**arguments, activation=torch.nn.ReLU())
    return OREPABlock(**arguments)


def step(model, fixture, state):
    """Output, gradients by released name, and buffers of ours afterwards."""
    released = {name: t.clone() for name, t in state.items()}
    learned = [name for name, grad in fixture["grad_of_params"].items()]
    for name in learned:
        released[name].requires_grad_()
    ours = convert_orepa(released, set())
    x = fixture["input"].clone().requires_grad_()
    output = functional_call(model, ours, (x,), strict=True)
    gradients = torch.autograd.grad(
        output.square().mean(), [x] + [released[name] for name in learned], allow_unused=True
    )
    return output, gradients[0], dict(zip(learned, gradients[1:], strict=True)), ours


def check(golden, fixture, output, grad_input, gradients, mode):
    golden.check(output, fixture[f"output_{mode}"], f"{mode} output")
    # Through a norm in train mode the mean square depends on little but gamma and beta: terms of size 1 cancel.
    size = 1.0 if mode == "train" else 0.0
    golden.check(grad_input, fixture["grad_input"], f"{mode} input gradient", at_least=size)
    assert gradients
    for name, gradient in gradients.items():
        expected = fixture["grad_of_params"][name]
        if expected is None:
            assert gradient is None or not gradient.any(), name
            continue
        assert gradient is not None, f"no gradient reaches {name}"
        golden.check(gradient, expected, f"{mode} gradient of {name}", at_least=size)


def test_eval_output_and_gradients(golden, golden_case):
    block, case = golden_case
    fixture = golden.read(block, case)
    model = make(block, fixture["config"]).eval()
    output, grad_input, gradients, _ = step(model, fixture, fixture["state_dict"])
    check(golden, fixture, output, grad_input, gradients, "eval")


def test_train_output_gradients_and_statistics(golden, golden_case):
    block, case = golden_case
    fixture = golden.read(block, case)
    trained = golden.read(block, f"{case}.train")
    model = make(block, fixture["config"]).train()
    output, grad_input, gradients, ours = step(model, {**trained, "input": fixture["input"]}, fixture["state_dict"])
    check(golden, trained, output, grad_input, gradients, "train")
    after = convert_orepa({**fixture["state_dict"], **trained["buffers_after"]}, set())
    names = [name for name in after if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert names
    for name in names:
        golden.check(ours[name], after[name], f"{name} after one step")


def test_deployed_kernel_and_loading(golden, golden_case):
    block, case = golden_case
    fixture = golden.read(block, case)
    model = load_checkpoint(fixture["state_dict"], make(block, fixture["config"]).eval())
    weight, bias = model.equivalent_kernel_bias()
    golden.check(weight, fixture["deployed_weight"], "deployed weight")
    golden.check(bias, fixture["deployed_bias"], "deployed bias")
    deployed = reparameterize(model, verify=fixture["input"])
    golden.check(deployed(fixture["input"]), fixture["output_eval"], "deployed output")

    names = fixture["deployed_state_dict_keys"]
    released = dict(zip(names, (fixture["deployed_weight"], fixture["deployed_bias"]), strict=True))
    fresh = make(block, fixture["config"]).eval().fuse()
    load_checkpoint({"state_dict": {f"module.{name}": t for name, t in released.items()}}, fresh)
    golden.check(fresh(fixture["input"]), fixture["output_eval"], "loaded deployed output")


@pytest.mark.parametrize("case", ["s1_8_16", "s1_16_16_g2", "s1_16_16_g8_internal2x"])
def test_squeezed_kernel_before_the_norm(golden, case):
    fixture, raw = golden.read("orepa3x3", case), golden.read("orepa3x3", f"weight_gen_{case}")
    model = load_checkpoint(fixture["state_dict"], make("orepa3x3", fixture["config"]))
    golden.check(model.conv.squeezed_kernel(), raw["weight"], "squeezed kernel")


def test_a_whole_released_network(golden):
    """Blocks under prefixes beside other modules; the deployed block with an activation has its convolution inside."""
    first, second = golden.read("orepa_repvgg", "s1_8_16"), golden.read("orepa3x3", "s1_16_16")

    def network():
        stage = torch.nn.Sequential(make("orepa_repvgg", first["config"]), make("orepa3x3", second["config"]))
        return torch.nn.ModuleDict({"stage1": stage, "linear": torch.nn.Linear(16, 3).double()}).eval()

    linear = {f"linear.{name}": t for name, t in torch.nn.Linear(16, 3).double().state_dict().items()}
    trained, deployed = dict(linear), dict(linear)
    for at, fixture in enumerate((first, second)):
        trained |= {f"stage1.{at}.{name}": t for name, t in fixture["state_dict"].items()}
        tensors = (fixture["deployed_weight"], fixture["deployed_bias"])
        deployed |= {f"stage1.{at}.{n}": t for n, t in zip(fixture["deployed_state_dict_keys"], tensors, strict=True)}
    model = load_checkpoint({"state_dict": trained}, network())
    plain = load_checkpoint({"state_dict": deployed}, reparameterize(model))
    x = first["input"]
    golden.check(model["stage1"][0](x), first["output_eval"], "first block")
    golden.check(model["stage1"](x), plain["stage1"](x), "both blocks")
    assert torch.equal(plain["linear"].weight, linear["linear.weight"])
    with pytest.raises(ValueError, match=r"unexpected: stage1\.1\.extra"):
        load_checkpoint({**trained, "stage1.1.extra": torch.zeros(1)}, network())
