"""Every block against the released one, through the importers: outputs, statistics, gradients, deployed kernels."""

import torch

from repkern.nn import OREPABlock, OREPADeepStem, OREPARepVGGBlock
from repkern.nn.csla import CSLABlock
from repkern.nn.dbb import DiverseBranchBlock
from repkern.nn.mobileone import MobileOneBlock
from repkern.nn.repvgg import RepVGGBlock

RELU = torch.nn.ReLU()


def repvgg(use_se=False, **arguments):
    return RepVGGBlock(**arguments, activation=RELU, se=arguments["out_channels"] // 16 if use_se else None)


def orepa_stem(case, **arguments):
    return OREPADeepStem(**arguments, factors="plain" if "base" in case else "orepa")


MAKE = {
    "repvgg": repvgg,
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
        if block == "orepa_deepstem":
            arguments["case"] = config["case"]
        return MAKE[block](**arguments, dtype=torch.float64)

    return make


def test_eval_output_and_gradients(golden, golden_case):
    golden.check_eval(*golden_case, maker(golden_case[0]))


def test_train_output_gradients_and_statistics(golden, golden_case):
    golden.check_train(*golden_case, maker(golden_case[0]))


def test_deployed_kernel_and_loading(golden, golden_case):
    golden.check_deployed(*golden_case, maker(golden_case[0]))
