"""MobileOne (paper 2206.04040) as released."""

from __future__ import annotations

from repkern.models.checkpoints.layout import Layout, deployed, renamed

__all__ = ["MOBILEONE"]

_SE = {"se.reduce": "se.down", "se.expand": "se.up"}

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
        deployed("reparam_conv", _SE, activated=True),
    ),
)
