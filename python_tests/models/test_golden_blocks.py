"""Every block against the released one, through the importers: outputs, statistics, gradients, deployed kernels."""

import torch

from repkern.nn import OREPABlock, OREPADeepStem, OREPARepVGGBlock
from repkern.nn.acb import ACBlock
from repkern.nn.csla import CSLABlock
from repkern.nn.dbb import DiverseBranchBlock
from repkern.nn.dyrep import DyRepBlock
from repkern.nn.mobileone import MobileOneBlock
from repkern.nn.repghost import RepGhostModule
from repkern.nn.repvgg import RepVGGBlock
from repkern.nn.seven_branches import SEVEN_BRANCHES

RELU = torch.nn.ReLU()


def repvgg(use_se=False, **arguments):
    return RepVGGBlock(**arguments, activation=RELU, se=arguments["out_channels"] // 16 if use_se else None)


def orepa_stem(case, **arguments):
    return OREPADeepStem(**arguments, factors="plain" if "base" in case else "orepa")


def dyrep(case, branches=(1,) * 7, **arguments):
    options = {"border": "released", "dtype": torch.float64}
    if case == "nested_s1_8_8":
        block = DyRepBlock(8, 8, 3, **options)
        block.dense = DyRepBlock(8, 8, 3, **options)
        block.expand = DyRepBlock(8, 8, 3, padding=0, branches=("1x1_kxk", "1x1_avg", "kxk"), **options)
        return block
    names = [name for name, present in zip(SEVEN_BRANCHES, branches, strict=True) if present]
    return DyRepBlock(**arguments, branches=names, border="released")


def repghost(inp, oup, relu, **arguments):
    return RepGhostModule(inp, oup, activation=RELU if relu else None, **arguments)


MAKE = {
    "repvgg": repvgg,
    "acb": ACBlock,
    "dyrep_dbb": dyrep,
    "repghost": repghost,
    "dbb": lambda **arguments: DiverseBranchBlock(**arguments, border="released"),
    "orepa3x3": OREPABlock,
    "orepa1x1": lambda **arguments: OREPABlock(kernel_size=1, **arguments),
    "orepa_deepstem": orepa_stem,
    "orepa_repvgg": lambda **arguments: OREPARepVGGBlock(**arguments, activation=RELU),
    "linearadd": lambda conv_scale_init, **arguments: CSLABlock(
        **arguments, activation=RELU, dense_scale=conv_scale_init, train_scales="all"
    ),
    "mobileone": lambda **arguments: MobileOneBlock(**{"padding": 0, **arguments}, activation=RELU),
}
GOLDEN_BLOCKS = tuple(MAKE)


def maker(block):
    def make(config):
        arguments = dict(config["kwargs"])
        if block in ("orepa_deepstem", "dyrep_dbb"):
            arguments["case"] = config["case"]
        return MAKE[block](**arguments, dtype=torch.float64)

    return make


def test_eval_output_and_gradients(golden, golden_case):
    golden.check_eval(*golden_case, maker(golden_case[0]))


def test_train_output_gradients_and_statistics(golden, golden_case):
    golden.check_train(*golden_case, maker(golden_case[0]))


def test_deployed_kernel_and_loading(golden, golden_case):
    golden.check_deployed(*golden_case, maker(golden_case[0]))
