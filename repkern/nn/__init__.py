"""Re-parameterizable blocks, and the conversion of whole models to and from them."""

from repkern.nn import fold
from repkern.nn._norm_state import SyncBatchNorm
from repkern.nn.acb import ACBlock
from repkern.nn.block import RepBlock
from repkern.nn.conv_norm_act import ConvNormAct
from repkern.nn.convert import ReplaceReport, replace_convs
from repkern.nn.csla import CSLABlock
from repkern.nn.csla_conv import CSLAConv2d
from repkern.nn.custom_l2 import custom_l2, custom_l2_parameters
from repkern.nn.dbb import DiverseBranchBlock
from repkern.nn.dirac import DiracConv2d
from repkern.nn.dyrep import DyRepBlock
from repkern.nn.group import group_squeeze, ungroup_squeeze
from repkern.nn.kinds import BLOCKS, KINDS, make_block
from repkern.nn.mobileone import MobileOneBlock
from repkern.nn.odb import ODBBlock
from repkern.nn.orepa import OREPAConv2d
from repkern.nn.orepa_block import OREPABlock, OREPADeepStem
from repkern.nn.orepa_repvgg import OREPARepVGGBlock
from repkern.nn.qarepvgg import QARepVGGBlock
from repkern.nn.reparameterize import reparameterize
from repkern.nn.repghost import RepGhostModule
from repkern.nn.repvgg import RepVGGBlock
from repkern.nn.squeeze_excite import SqueezeExcite
from repkern.nn.synchronize import synchronize_norms
from repkern.nn.trivial import TrivialRepConv2d
from repkern.nn.verify import ReparameterizeReport
from repkern.nn.winograd import WinogradConv2d

__all__ = [
    "BLOCKS",
    "KINDS",
    "ACBlock",
    "CSLABlock",
    "CSLAConv2d",
    "ConvNormAct",
    "DiracConv2d",
    "DiverseBranchBlock",
    "DyRepBlock",
    "MobileOneBlock",
    "ODBBlock",
    "OREPABlock",
    "OREPAConv2d",
    "OREPADeepStem",
    "OREPARepVGGBlock",
    "QARepVGGBlock",
    "RepBlock",
    "RepGhostModule",
    "RepVGGBlock",
    "ReparameterizeReport",
    "ReplaceReport",
    "SqueezeExcite",
    "SyncBatchNorm",
    "TrivialRepConv2d",
    "WinogradConv2d",
    "custom_l2",
    "custom_l2_parameters",
    "fold",
    "group_squeeze",
    "make_block",
    "reparameterize",
    "replace_convs",
    "synchronize_norms",
    "ungroup_squeeze",
]
