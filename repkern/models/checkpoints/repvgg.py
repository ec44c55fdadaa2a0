"""RepVGG (paper 2101.03697) and RepVGGplus as released."""

from __future__ import annotations

from repkern.models.checkpoints.layout import SE, Layout, deployed, renamed

__all__ = ["REPVGG"]

REPVGG = Layout(
    "repvgg",
    "DingXiaoH/RepVGG: RepVGG and RepVGGplus",
    (
        renamed(
            {
                "rbr_dense.conv": "dense",
                "rbr_dense.bn": "dense_bn",
                "rbr_1x1.conv": "pointwise",
                "rbr_1x1.bn": "pointwise_bn",
                "rbr_identity": "identity_bn",
                **SE,
            },
            "rbr_dense.conv.weight",
            needs=("rbr_1x1.conv.weight",),
        ),
        deployed("rbr_reparam", SE, activated=True),
    ),
)
