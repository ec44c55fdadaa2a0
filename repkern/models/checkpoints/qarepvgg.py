"""QARepVGG (paper 2212.01593) as YOLOv6 and its descendants write it."""

from __future__ import annotations

from repkern.models.checkpoints.layout import SE, Layout, deployed, renamed

__all__ = ["QAREPVGG"]

QAREPVGG = Layout(
    "qarepvgg",
    "QARepVGG in YOLOv6",
    (
        renamed(
            {
                "rbr_dense.conv": "dense",
                "rbr_dense.bn": "dense_bn",
                "rbr_1x1": "pointwise",
                "bn": "post_bn",
                **SE,
            },
            "rbr_1x1.weight",
            needs=("rbr_dense.conv.weight", "bn.running_mean"),
        ),
        deployed("rbr_reparam", SE, activated=True),
    ),
)
