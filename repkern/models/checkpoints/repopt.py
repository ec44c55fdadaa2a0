"""RepOptimizers (paper 2205.15242) as released: the hyper-search, CSLA, baseline and target blocks; files of scales."""

from __future__ import annotations

from repkern.models.checkpoints.layout import CONV_BN, SE, Layout, renamed

__all__ = ["REPOPT", "REPOPT_SCALES"]

_SCALES = {
    "scale_conv": "dense_scale",
    "scale_1x1": "pointwise_scale",
    "scale_identity": "identity_scale",
}

REPOPT = Layout(
    "repopt",
    "DingXiaoH/RepOptimizers: RepOpt-VGG, modes hs, csla, repvgg and target",
    (
        renamed(
            {"conv": "dense", "conv_1x1": "pointwise", "bn": "bn", **_SCALES, **SE},
            "scale_conv.weight",
            needs=("conv.weight",),
        ),
        renamed(
            {
                "conv_3x3": "dense",
                "bn_3x3": "dense_bn",
                "conv_1x1": "pointwise",
                "bn_1x1": "pointwise_bn",
                "bn_identity": "identity_bn",
                **SE,
            },
            "conv_3x3.weight",
            needs=("bn_3x3.running_mean",),
        ),
        CONV_BN,
    ),
)

_ONLY_SCALES = {f"{released}.weight": ours for released, ours in _SCALES.items()}

#: Only the scales: of a *-scales.pth file, or picked out of a whole hyper-search checkpoint.
REPOPT_SCALES = Layout(
    "repopt_scales",
    "DingXiaoH/RepOptimizers: scales that a hyper-search found",
    (
        renamed(_ONLY_SCALES, "scale_conv.weight"),
        renamed(
            {"cheap_operation.1.weight": "fusion.dense_scale", "fusion_scale.weight": "fusion.identity_scale"},
            "fusion_scale.weight",
        ),
    ),
)
