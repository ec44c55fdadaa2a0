"""What only OREPA's released blocks have: the kernel before its norm, and its blocks beside other modules."""

import pytest
import torch

from repkern import load_checkpoint, reparameterize
from repkern.nn import OREPABlock, OREPARepVGGBlock


def make(config):
    block = OREPARepVGGBlock if "RepVGG" in config["ctor"] else OREPABlock
    activation = torch.nn.ReLU() if block is OREPARepVGGBlock else None
    return block(**config["kwargs"], activation=activation, dtype=torch.float64)


@pytest.mark.parametrize("case", ["s1_8_16", "s1_16_16_g2", "s1_16_16_g8_internal2x"])
def test_squeezed_kernel_before_the_norm(golden, case):
    fixture, raw = golden.read("orepa3x3", case), golden.read("orepa3x3", f"weight_gen_{case}")
    model = load_checkpoint(fixture["state_dict"], make(fixture["config"]))
    golden.check(model.conv.squeezed_kernel(), raw["weight"], "squeezed kernel")


def test_a_whole_released_network(golden):
    """Blocks under prefixes beside other modules; the deployed block with an activation has its convolution inside."""
    first, second = golden.read("orepa_repvgg", "s1_8_16"), golden.read("orepa3x3", "s1_16_16")

    def network():
        stage = torch.nn.Sequential(make(first["config"]), make(second["config"]))
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
