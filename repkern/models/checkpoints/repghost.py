"""RepGhost (paper 2211.06088) as released, and as timm writes it."""

from __future__ import annotations

from repkern.models.checkpoints.layout import BlockRule, Layout, renamed

__all__ = ["REPGHOST"]

_PRIMARY = {"primary_conv.0": "primary.conv", "primary_conv.1": "primary.bn"}
_DEPLOYED = renamed({**_PRIMARY, "cheap_operation": "fusion"}, "cheap_operation.weight")

REPGHOST = Layout(
    "repghost",
    "ChengpengChen/RepGhost, and RepGhostNet in timm",
    (
        renamed(
            {
                **_PRIMARY,
                "cheap_operation.0": "fusion.dense",
                "cheap_operation.1": "fusion.dense_bn",
                "fusion_bn.0": "fusion.identity_bn",
            },
            "cheap_operation.0.weight",
            needs=("primary_conv.0.weight", "cheap_operation.1.running_mean"),
        ),
        # Only the depthwise half is folded there; the norm of the other one stays.
        BlockRule(
            _DEPLOYED.mark,
            _DEPLOYED.keys,
            _DEPLOYED.convert,
            needs=(r"primary_conv\.0\.weight",),
            deployed=True,
            activated=True,
        ),
    ),
)
