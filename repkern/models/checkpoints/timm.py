"""RepVGG and MobileOne as timm writes them. (timm's RepGhostNet has the names of the released one.)"""

from __future__ import annotations

from repkern.models.checkpoints.layout import Layout, renamed
from repkern.models.checkpoints.mobileone import DEPLOYED

__all__ = ["TIMM"]

_SE = {"attn.fc1": "se.down", "attn.fc2": "se.up"}

TIMM = Layout(
    "timm",
    "huggingface/pytorch-image-models: RepVGG and MobileOne",
    (
        renamed(
            {
                "conv_kxk.conv": "dense",
                "conv_kxk.bn": "dense_bn",
                "conv_1x1.conv": "pointwise",
                "conv_1x1.bn": "pointwise_bn",
                "identity": "identity_bn",
                **_SE,
            },
            "conv_kxk.conv.weight",
        ),
        renamed(
            {
                "conv_kxk.#.conv": "dense.#",
                "conv_kxk.#.bn": "dense_bn.#",
                "conv_scale.conv": "pointwise",
                "conv_scale.bn": "pointwise_bn",
                "identity": "identity_bn",
                **_SE,
            },
            "conv_kxk.0.conv.weight",
        ),
        DEPLOYED,
    ),
)
