"""Diverse Branch Block (paper 2103.13425) as released."""

from __future__ import annotations

from repkern.models.checkpoints.layout import CONV_BN_DEPLOYED, Layout, deployed, renamed

__all__ = ["DBB"]

_SEQUENCE = "dbb_1x1_kxk"

DBB = Layout(
    "dbb",
    "DingXiaoH/DiverseBranchBlock, and DBB in OREPA",
    (
        renamed(
            {
                "dbb_origin.conv": "dense",
                "dbb_origin.bn": "dense_bn",
                "dbb_1x1.conv": "pointwise",
                "dbb_1x1.bn": "pointwise_bn",
                "dbb_avg.conv": "avg",
                "dbb_avg.bn.bn": "avg_inner_bn",
                "dbb_avg.avgbn": "avg_bn",
                # idconv1 is a deviation from the identity and conv1 a plain 1x1, in the same blocks as ours.
                f"{_SEQUENCE}.idconv1": "reduce",
                f"{_SEQUENCE}.conv1": "reduce",
                f"{_SEQUENCE}.bn1.bn": "reduce_bn",
                f"{_SEQUENCE}.conv2": "expand",
                f"{_SEQUENCE}.bn2": "expand_bn",
            },
            "dbb_origin.conv.weight",
        ),
        deployed("dbb_reparam", activated=False),
        CONV_BN_DEPLOYED,
    ),
)
