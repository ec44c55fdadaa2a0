"""MobileOne (paper 2206.04040) as released."""

from __future__ import annotations

from repkern.models.checkpoints.layout import Layout, deployed, renamed

__all__ = ["DEPLOYED", "MOBILEONE"]

_SE = {"se.reduce": "se.down", "se.expand": "se.up"}
#: The deployed block, which timm names alike but for its squeeze-excite.
DEPLOYED = deployed("reparam_conv", {**_SE, "attn.fc1": "se.down", "attn.fc2": "se.up"}, activated=True)

MOBILEONE = Layout(
    "mobileone",
    "apple/ml-mobileone",
    (
        renamed(
            {
                "rbr_conv.#.conv": "dense.#",
                "rbr_conv.#.bn": "dense_bn.#",
                "rbr_scale.conv": "pointwise",
                "rbr_scale.bn": "pointwise_bn",
                "rbr_skip": "identity_bn",
                **_SE,
            },
            "rbr_conv.0.conv.weight",
        ),
        DEPLOYED,
    ),
)
