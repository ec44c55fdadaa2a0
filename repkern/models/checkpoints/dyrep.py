"""DyRep's seven-branch blocks (paper 2203.12868) as released, nested ones included."""

from __future__ import annotations

from dataclasses import replace

from repkern.models.checkpoints.layout import Block, Layout, deployed, renamed

__all__ = ["DYREP"]

_RENAMED = renamed(
    {
        "dbb_kxk.conv": "dense",
        "dbb_kxk.bn": "dense_bn",
        "dbb_1x1.conv": "pointwise",
        "dbb_1x1.bn": "pointwise_bn",
        "dbb_1x1_kxk.conv1": "reduce",
        "dbb_1x1_kxk.bn1.bn": "reduce_bn",
        "dbb_1x1_kxk.conv2": "expand",
        "dbb_1x1_kxk.bn2": "expand_bn",
        "dbb_1x1_avg.conv": "avg",
        "dbb_1x1_avg.bn.bn": "avg_inner_bn",
        "dbb_1x1_avg.avgbn": "avg_bn",
        "dbb_1xk.conv": "horizontal",
        "dbb_1xk.bn": "horizontal_bn",
        "dbb_kx1.conv": "vertical",
        "dbb_kx1.bn": "vertical_bn",
        "dbb_id": "identity_bn",
    },
    "dbb_kxk.bn.running_mean",
)


def _convert(block: Block) -> Block:
    """A nested block that was cut down to one convolution left a bias, which the norm behind it takes away again."""
    ours = _RENAMED.convert(block)
    bias = ours.pop("expand.bias", None)
    if bias is not None:
        ours["expand_bn.running_mean"] = ours["expand_bn.running_mean"] - bias
    return ours


DYREP = Layout(
    "dyrep",
    "hunto/image_classification_sota: DyRep",
    (
        replace(_RENAMED, convert=_convert),
        deployed("conv_deployed", activated=False),
    ),
)
