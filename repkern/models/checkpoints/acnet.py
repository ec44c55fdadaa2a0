"""ACNet (paper 1908.03930) as released, also beside DBB."""

from __future__ import annotations

from repkern.models.checkpoints.layout import CONV_BN_DEPLOYED, Layout, deployed, renamed

__all__ = ["ACNET"]

ACNET = Layout(
    "acnet",
    "DingXiaoH/ACNet and DingXiaoH/DiverseBranchBlock: ACBlock",
    (
        renamed(
            {
                "square_conv": "dense",
                "square_bn": "dense_bn",
                "ver_conv": "vertical",
                "ver_bn": "vertical_bn",
                "hor_conv": "horizontal",
                "hor_bn": "horizontal_bn",
            },
            "square_conv.weight",
        ),
        deployed("fused_conv", activated=False),
        CONV_BN_DEPLOYED,
    ),
)
